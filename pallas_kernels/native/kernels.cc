// Products with packed weights on CPUs, as XLA FFI handlers: the choice between instruction
// sets and the division of work among threads.

#include <atomic>
#include <string>

#include "ffi.h"
#include "engines.h"
#include "operands.h"
#include "team.h"

namespace qjax {
namespace {

// Best first; what follows "plain" runs only by name.
const Engine* const kEngines[] = {
#ifdef QJAX_AMX
    &kAmx,
#endif
#ifdef QJAX_X86
    &kAvx512, &kAvxVnni, &kAvx2,
#endif
#ifdef QJAX_ARM
    &kNeon,
#endif
    &kPlain, &kAmxEmulated};

#ifdef QJAX_AMX
// CPUID has AMX-TILE and AMX-INT8, the system saves tiles (XCR0), and lets this process
// use them.
bool has_amx() {
  uint32_t a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 24 & 3) != 3) return false;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (a >> 17 & 3) == 3 && !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
}
#endif

bool supported(const std::string& isa) {
#ifdef QJAX_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avxvnni") {
    // Not known to __builtin_cpu_supports of older compilers: CPUID 7.1, EAX bit 4.
    uint32_t a = 7, b, c = 1, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return avx2 && (a >> 4 & 1);
  }
#ifdef QJAX_AMX
  if (isa == "amx") return supported("avx512") && has_amx();
#endif
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  }
#endif
#ifdef QJAX_ARM
#if defined(__linux__)
  if (isa == "neon") return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  if (isa == "neon") return true;
#endif
#endif
  return isa == "plain" || isa == "amx-emulated";
}

const Engine* best() {
  for (const Engine* engine : kEngines) {
    if (supported(engine->name)) return engine;
  }
  return nullptr;  // never: "plain" is always supported
}

std::atomic<const Engine*> chosen{best()};

}  // namespace

const Engine& engine() { return *chosen.load(); }

namespace {

// Rows of W per block. Few rows of x wait for memory, which is fastest when few byte rows
// are read at once: 64 up to 8 rows of x, fewer for one (measured on EPYC).
int64_t block_rows(const Call& c) {
  const int64_t most = c.integer_engine ? kBlock : kFloatBlock;
  if (c.transpose || c.strips || c.m > 8) return most;
  const int64_t bytes = c.m > 1 ? 64 : c.per > 1 ? 32 : 16;
  const int64_t few = c.unit_rows > 1 ? 64 : bytes * c.per;
  return few < most ? few : most;
}

void cut_blocks(Call& c, int64_t group, const Engine& engine) {
  const int64_t most = block_rows(c);
  c.blocks.reserve((c.k / group + 1) * ((group < c.k ? group : c.k) / most + 1));
  int64_t g = 0;
  for (int64_t start = 0; start < c.k; start += group, ++g) {
    int64_t end = start + group < c.k ? start + group : c.k;
    for (int64_t first = start; first < end; first += most) {
      Block block;
      block.first = first;
      block.rows = end - first < most ? end - first : most;
      block.group = g;
      block.packed = first / c.per * c.unit_rows;
      block.units = (block.rows + c.per - 1) / c.per;
      block.dwords = (block.units + 3) / 4 * c.per;
      if (c.blocks.empty() && c.integer_engine && engine.planes) {
        const int64_t tile = block.dwords < kTileRows ? block.dwords : kTileRows;
        c.planes = c.m * c.halves * tile >= engine.planes;
        if (c.planes) c.tile = tile;
      }
      block.dwords = (block.dwords + c.tile - 1) / c.tile * c.tile;
      block.dword = c.dwords;
      c.dwords += block.dwords;
      c.blocks.push_back(block);
    }
  }
}

bool run_forward(const Call& c, const Engine& engine, xla::ffi::ThreadPool& pool,
                 int64_t threads) {
  const int64_t strip = engine.strip;
  const int64_t rows = c.m < 512 ? c.m : 512;
  const int64_t share = (c.n + threads * 4 - 1) / (threads * 4);
  int64_t width = 65536 / rows < share ? 65536 / rows : share;
  // Of what is stored, or asked for ahead.
  const int64_t unit = c.strips ? kStrip : width > 512 ? 512 : strip;
  width = (width + unit - 1) / unit * unit;
  const int64_t across = (c.n + width - 1) / width, down = (c.m + rows - 1) / rows;
  return parallel(pool, threads, across * down, [&](int64_t i) {
    int64_t m0 = i / across * rows, c0 = i % across * width;
    int64_t m1 = m0 + rows < c.m ? m0 + rows : c.m;
    int64_t c1 = c0 + width < c.n ? c0 + width : c.n;
    engine.forward(c, m0, m1, c0, c1);
  });
}

bool run_transposed(const Call& c, const Engine& engine, xla::ffi::ThreadPool& pool,
                    int64_t threads) {
  const int64_t blocks = c.blocks.size();
  // Codes are decoded once per part, so parts are as large as keeps all threads busy.
  int64_t rows = kFewRows;
  if (c.m > kFewRows) {
    const int64_t parts = (4 * threads + blocks - 1) / blocks;
    rows = (c.m + parts - 1) / parts;
    rows = rows < 64 ? 64 : rows > 1024 ? 1024 : rows;
  }
  return parallel(pool, threads, blocks * ((c.m + rows - 1) / rows), [&](int64_t i) {
    int64_t m0 = i / blocks * rows;
    engine.transposed(c, m0, m0 + rows < c.m ? m0 + rows : c.m, c.blocks[i % blocks]);
  });
}

bool run(Call& c, const Engine& engine, xla::ffi::ThreadPool& pool) {
  struct Buffers {
    Buffer xq, xf, step, sum;
  };
  // Few rows need little memory, and getting it takes as long as a small product.
  thread_local Buffers kept;
  Buffers fresh;
  auto& [xq, xf, step, sum] = c.m <= kFewRows ? kept : fresh;
  const int64_t threads = pool.num_threads() > 0 ? pool.num_threads() : 1;
  const size_t blocks = c.blocks.size();
  c.step = step.get<float>(c.m * blocks + 1);
  c.sum = sum.get<float>(c.m * blocks + 1);
  float* floats = nullptr;
  if (c.integer_engine) {
    // Tiles may reach beyond the last row.
    const int64_t more = c.planes ? kTileRows * kBlock / 4 : 0;
    c.xq = xq.get<int32_t>(c.m * c.dwords * c.halves + more);
  } else if (c.x.type == Type::f32) {
    c.xf = static_cast<const float*>(c.x.data);
  } else {
    c.xf = floats = xf.get<float>(c.m * c.columns() + 1);
  }
  const int64_t per = (c.m + threads * 4 - 1) / (threads * 4);
  auto prepare = [&](int64_t i) {
    for (int64_t r = i * per; r < (i + 1) * per && r < c.m; ++r) {
      engine.prepare(c, floats, r);
    }
  };
  if (c.m * c.columns() < 1 << 15) {
    for (int64_t r = 0; r < c.m; ++r) engine.prepare(c, floats, r);
  } else if (!parallel(pool, threads, (c.m + per - 1) / per, prepare)) {
    return false;
  }
  return c.transpose ? run_transposed(c, engine, pool, threads)
                     : run_forward(c, engine, pool, threads);
}

namespace ffi = xla::ffi;

bool empty(const ffi::AnyBuffer& buffer) { return buffer.element_count() == 0; }

ffi::Error bad(const std::string& what) {
  return ffi::Error::InvalidArgument("qjax native matmul: " + what);
}

// A leaf `[rows, n]`, or the layer of a stack `[layers, rows, n]` that `layer` names.
bool leaf(const ffi::AnyBuffer& buffer, int64_t layer, int64_t layers, int64_t rows,
          int64_t n, size_t size, const void** data) {
  bool fits = layers < 0 ? shaped(buffer, {rows, n}) : shaped(buffer, {layers, rows, n});
  int64_t skip = layers < 0 ? 0 : layer * rows * n;
  *data = static_cast<const uint8_t*>(buffer.untyped_data()) + skip * size;
  return fits;
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                    ffi::AnyBuffer scale, ffi::AnyBuffer zero, ffi::AnyBuffer table,
                    ffi::AnyBuffer bias, ffi::AnyBuffer x_scale, ffi::AnyBuffer layer,
                    ffi::Result<ffi::AnyBuffer> y, int64_t k, int64_t n, int64_t kind,
                    int64_t bits, int64_t group, float offset, bool transpose,
                    bool strips, int64_t x_bits) {
  Call c;
  if (bits < 1 || bits > 8 || k < 1 || n < 1 || group < 1 || kind < 0 || kind > 3) {
    return bad("attributes out of range");
  }
  c.kind = static_cast<Kind>(kind);
  c.k = k, c.n = n, c.bits = int(bits), c.offset = offset, c.transpose = transpose;
  const bool fields = bits == 3 || (bits > 4 && bits < 8);
  c.per = bits == 8 ? 1 : fields ? 8 : 8 / int(bits);
  c.unit_rows = fields ? int(bits) : 1;
  if ((c.kind == Kind::e4m3 || c.kind == Kind::e5m2) && bits != 8) {
    return bad("float8 codes have 8 bits");
  }
  const int64_t groups = (k + group - 1) / group;
  if (groups > 1 && group % c.per) return bad("groups cut a packing unit");
  const int64_t units = (k + c.per - 1) / c.per;
  int64_t packed = units * c.unit_rows, wide = n, rows = groups;
  if (strips) {
    const bool ordered = c.kind == Kind::integer;
    if (ordered && transpose) return bad("strips of integers have no transpose");
    if (ordered && groups > 1 && group % (4 * c.per)) return bad("groups cut a strip");
    const int64_t count = (n + kStrip - 1) / kStrip;
    c.strips = true, c.groups = groups;
    c.strip_rows = ordered ? (units + 3) / 4 * 4 * c.unit_rows : packed;
    packed = count * c.strip_rows / (ordered ? 4 : 1);
    wide = ordered ? 4 * kStrip : kStrip, rows = count * groups;
  }
  const size_t rank = codes.dimensions().size();
  if (rank != 2 && rank != 3) return bad("codes need rank 2 or 3");
  const int64_t layers = rank == 3 ? codes.dimensions()[0] : -1;
  int64_t at = 0;
  const std::string fault = read_layer(layer, layers, &at);
  if (!fault.empty()) return bad(fault);
  const void* data = nullptr;
  if (!leaf(codes, at, layers, packed, wide, 1, &data) || codes.size_bytes() !=
      codes.element_count()) {
    return bad("codes do not have the packed shape");
  }
  c.codes = static_cast<const uint8_t*>(data);
  c.signed_codes = codes.element_type() == ffi::DataType::S8;
  c.scale.type = type_of(scale.element_type());
  if (c.scale.type == Type::u8) c.scale.type = Type::e8m0;
  if (c.scale.type == Type::none || c.scale.type == Type::s8 ||
      !leaf(scale, at, layers, rows, strips ? kStrip : n, size_of(c.scale.type),
            &c.scale.data)) {
    return bad("scale has another shape or type than [groups, n]");
  }
  if (!empty(zero)) {
    c.zero.type = type_of(zero.element_type());
    if (c.zero.type == Type::none ||
        !leaf(zero, at, layers, rows, strips ? kStrip : n, size_of(c.zero.type),
              &c.zero.data)) {
      return bad("zero has another shape or type than [groups, n]");
    }
  }
  const int64_t entries = int64_t(1) << bits, last = entries - 1;
  if (c.kind == Kind::table) {
    const bool shared = shaped(table, {entries});
    if ((!shared && !shaped(table, {layers, entries})) ||
        table.element_type() != ffi::DataType::F32) {
      return bad("table has another shape or type than float32 [2**bits]");
    }
    auto* values = static_cast<const float*>(table.untyped_data());
    if (!shared) values += at * entries;
    c.bf16_table = true;
    for (int64_t i = 0; i < 256; ++i) {
      uint32_t entry;
      std::memcpy(&entry, &values[i & last], 4);
      c.bf16_table = c.bf16_table && !(entry & 0xFFFF);
      c.table[i] = values[i & last];
    }
  } else {
    for (int64_t i = 0; i < 256; ++i) c.table[i] = float(i & last);
  }
  if (x.dimensions().size() != 2 || x.dimensions()[1] != c.columns()) {
    return bad("x has another shape than [m, " + std::to_string(c.columns()) + "]");
  }
  c.m = x.dimensions()[0];
  c.x = {x.untyped_data(), type_of(x.element_type())};
  c.integer_engine = c.kind == Kind::integer && !transpose;
  c.rounded = x_bits == 8;
  if (c.rounded && !c.integer_engine) return bad("int8 activations need integers");
  if (!empty(x_scale)) {
    c.x_scale = {x_scale.untyped_data(), type_of(x_scale.element_type())};
    if (c.x_scale.type != Type::f32 || x_bits != 8 || !shaped(x_scale, {c.m})) {
      return bad("x_scale has to be float32 [m], for int8 activations");
    }
  }
  if (!is_float(c.x.type) && (c.x.type != Type::s8 || empty(x_scale))) {
    return bad("x has to be float32, bfloat16 or float16, or int8 with x_scale");
  }
  const int64_t width = transpose ? k : n;
  if (!empty(bias)) {
    c.bias = {bias.untyped_data(), type_of(bias.element_type())};
    if (!is_float(c.bias.type) || !shaped(bias, {width})) {
      return bad("bias has another shape or type than one float per column");
    }
  }
  c.y = y->untyped_data();
  c.y_type = type_of(y->element_type());
  if (!is_float(c.y_type) || !shaped(*y, {c.m, width})) {
    return bad("the result has another shape or type");
  }
  if (c.m == 0) return ffi::Error::Success();
  try {
    const Engine& engine = qjax::engine();
    c.halves = c.rounded && bits <= engine.byte_bits ? 1 : 2;
    cut_blocks(c, group, engine);
    if (run(c, engine, pool)) return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
  }
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax native matmul: no memory");
}

// Reads every byte once and returns the sum of 64-bit words: the bandwidth that a
// product with this many bytes could have.
ffi::Error stream_read(ffi::ThreadPool pool, ffi::AnyBuffer x,
                       ffi::Result<ffi::AnyBuffer> y) {
  if (y->element_type() != ffi::DataType::U32 || y->element_count() < 1) {
    return bad("the result has to be uint32");
  }
  auto* words = static_cast<const uint64_t*>(x.untyped_data());
  const int64_t count = x.size_bytes() / 8, threads = pool.num_threads();
  const int64_t parts = 4 * (threads > 0 ? threads : 1);
  std::atomic<uint64_t> total{0};
  auto read = [&](int64_t i) {
    const int64_t end = count * (i + 1) / parts;
    uint64_t sum[32] = {};
    int64_t at = count * i / parts;
    for (; at + 32 <= end; at += 32) {
      for (int j = 0; j < 32; ++j) sum[j] += words[at + j];
    }
    for (; at < end; ++at) sum[0] += words[at];
    for (uint64_t s : sum) total += s;
  };
  parallel(pool, threads, parts, read);
  *static_cast<uint32_t*>(y->untyped_data()) = static_cast<uint32_t>(total.load());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qjax

QJAX_EXPORT XLA_FFI_Error* qjax_matmul(XLA_FFI_CallFrame*);
QJAX_EXPORT XLA_FFI_Error* qjax_stream_read(XLA_FFI_CallFrame*);

using Any = xla::ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_matmul, qjax::multiply,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Any>()   // x
                                  .Arg<Any>()   // codes
                                  .Arg<Any>()   // scale
                                  .Arg<Any>()   // zero
                                  .Arg<Any>()   // table
                                  .Arg<Any>()   // bias
                                  .Arg<Any>()   // x_scale
                                  .Arg<Any>()   // layer
                                  .Ret<Any>()   // y
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<float>("offset")
                                  .Attr<bool>("transpose")
                                  .Attr<bool>("strips")
                                  .Attr<int64_t>("x_bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qjax_stream_read, qjax::stream_read,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<Any>().Ret<Any>());

QJAX_EXPORT int qjax_ffi_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}

QJAX_EXPORT const char* qjax_isa() {
  return qjax::engine().name;
}

// Chooses an instruction set, the best one for "". Returns whether this machine has it.
QJAX_EXPORT int qjax_choose_isa(const char* name) {
  const std::string wanted = name;
  if (wanted.empty()) {
    qjax::chosen = qjax::best();
    return 1;
  }
  for (const qjax::Engine* engine : qjax::kEngines) {
    if (wanted == engine->name && qjax::supported(wanted)) {
      qjax::chosen = engine;
      return 1;
    }
  }
  return 0;
}
