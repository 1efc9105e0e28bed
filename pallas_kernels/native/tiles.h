// Integer products in the tiles of a matrix unit, included after engine.h in the namespace
// of the vector instructions that decode panels and scale sums: with QJAX_TILES_AMX for
// Intel AMX, else on plain arrays in place of the unit, so that it is tested anywhere.
//
// A tile has up to 16 rows of 64 bytes. Tiles 0 to 3 are sums, of 16 columns each; tile 4
// is quantized x, a row per row and half of x ("planes"); tiles 5 to 7 are 16 columns of
// a panel, a row per dword of x. Sums are exact, like those of engine.h.

#ifdef QJAX_TILES_AMX

// The unit, from construction to destruction, with `rows` planes of `dwords` dwords.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t dwords) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.bytes[t] = static_cast<uint16_t>(t == 4 ? 4 * dwords : 64);
      shape.rows[t] = static_cast<uint8_t>(t > 4 ? dwords : rows);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  INLINE_MEMBER void clear() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  INLINE_MEMBER void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T)
                     : "memory");
  }
  template <int T>
  INLINE_MEMBER void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T)
                     : "memory");
  }
  // Tile T += signed bytes of tile 4 times unsigned bytes of tile V.
  template <int T, int V>
  INLINE_MEMBER void dot() {
    __asm__ volatile("tdpbsud %%tmm%c1, %%tmm4, %%tmm%c0" ::"i"(T), "i"(V));
  }
};

#else

class Tiles {
 public:
  Tiles(int64_t rows, int64_t dwords) {
    for (int t = 0; t < 8; ++t) {
      bytes_[t] = t == 4 ? 4 * dwords : 64;
      rows_[t] = t > 4 ? dwords : rows;
    }
  }

  template <int T>
  void clear() {
    std::memset(data_[T], 0, sizeof data_[T]);
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    clear<T>();
    for (int64_t i = 0; i < rows_[T]; ++i) {
      std::memcpy(data_[T][i], static_cast<const uint8_t*>(p) + i * stride, bytes_[T]);
    }
  }
  template <int T>
  void store(void* p, int64_t stride) {
    for (int64_t i = 0; i < rows_[T]; ++i) {
      std::memcpy(static_cast<uint8_t*>(p) + i * stride, data_[T][i], bytes_[T]);
    }
  }
  template <int T, int V>
  void dot() {
    for (int64_t i = 0; i < rows_[T]; ++i) {
      for (int64_t j = 0; j < 16; ++j) {
        int32_t sum;
        std::memcpy(&sum, data_[T][i] + 4 * j, 4);
        for (int64_t b = 0; b < bytes_[4]; ++b) {
          sum += int32_t(static_cast<int8_t>(data_[4][i][b])) *
                 int32_t(data_[V][b / 4][4 * j + b % 4]);
        }
        std::memcpy(data_[T][i] + 4 * j, &sum, 4);
      }
    }
  }

 private:
  uint8_t data_[8][16][64] = {};
  int64_t bytes_[8], rows_[8];
};

#endif

// A panel and what its products with rows of x become: y += scale * step * (x . codes -
// zero * sum of x).
struct Product {
  const uint8_t* panel;
  int64_t dwords;
  Factors f;
  const F *s, *z;
  float* y;
  int64_t y_stride;
};

// Sums of `each` rows of x from row `first` on, to [each * H][W].
template <int H, int... T>
INLINE void dot_tiles(Tiles& tiles, int64_t tile, const Product& p, int64_t first,
                      int64_t each, int64_t rows, int32_t* sums,
                      std::integer_sequence<int, T...>) {
  const int32_t* x = p.f.x + first * p.f.x_stride;
  const int32_t* next = x + 2 * each * p.f.x_stride;  // asked for ahead of its turn
  const int64_t lines = first + 2 * each < rows ? each * H : 0;
  const uint8_t* panel = p.panel;
  (tiles.template clear<T>(), ...);
  for (int64_t d = 0; d < p.dwords; d += tile, panel += tile * 4 * W) {
    for (int64_t i = 0; i < lines; ++i, next += tile) PREFETCH(next);
    tiles.template load<4>(x + d, 4 * p.dwords);
    ((tiles.template load<5 + T % 3>(panel + 64 * T, 4 * W),
      tiles.template dot<T, 5 + T % 3>()),
     ...);
  }
  (tiles.template store<T>(sums + 16 * T, 4 * W), ...);
}

// Adds the sums of rows [first, last) of x to y.
template <int H>
static void add_tiles(const int32_t* sums, const Product& p, int64_t first, int64_t last) {
  Factors f = p.f;
  f.step += first * f.step_stride;
  f.sum += first * f.step_stride;
  float* y = p.y + first * p.y_stride;
  for (int64_t r = first; r < last; ++r, y += p.y_stride) {
    I acc[1][H][4];
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int t = 0; t < 4; ++t, sums += L) {
        acc[0][h][t] = iload(reinterpret_cast<const uint8_t*>(sums));
      }
    }
    add_sums<H, 1>(acc, f, p.s, p.z, y, p.y_stride);
    f.step += f.step_stride;
    f.sum += f.step_stride;
  }
}

// Adds the product to y [rows][4 L], `each` rows at a time; the tiles are one turn ahead
// of the scaling of sums.
template <int H>
static void multiply_tiles(Tiles& tiles, int64_t tile, const Product& p, int64_t rows,
                           int64_t each) {
  constexpr auto parts = std::make_integer_sequence<int, W / 16>();
  alignas(64) int32_t sums[2][kTileRows * W];
  dot_tiles<H>(tiles, tile, p, 0, each, rows, sums[0], parts);
  int turn = 0;
  for (int64_t first = 0; first < rows; first += each, turn ^= 1) {
    const int64_t next = first + each;
    if (next < rows) dot_tiles<H>(tiles, tile, p, next, each, rows, sums[turn ^ 1], parts);
    add_tiles<H>(sums[turn], p, first, next < rows ? next : rows);
  }
}

// `forward` where integers come in planes.
static void forward_tiles(const Call& c, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
  if (!c.planes) return forward(c, m0, m1, c0, c1);
  thread_local Buffer panels;
  uint8_t* panel = panels.get<uint8_t>(kBlock * W);
  const int64_t rows = m1 - m0, count = (rows * c.halves + kTileRows - 1) / kTileRows;
  const int64_t each = (rows + count - 1) / count;
  const DecodeCodes decode =
      codes_decoder(c);
  const auto multiply = c.halves == 2 ? multiply_tiles<2> : multiply_tiles<1>;
  const int flip = flip_of(c);
  Tiles tiles(each * c.halves, c.tile);
  auto add = [&](const Strip& strip, Ahead ahead, const Block& block, const F* s,
                 const F* z, float* y, int64_t y_stride) {
    ahead.rate = (ahead.lines + block.dwords - 1) / block.dwords;
    decode(strip.p, strip.stride, block.units, flip, ahead, panel);
    const Product p = {panel, block.dwords, factors_of(c, block, m0), s, z, y, y_stride};
    multiply(tiles, c.tile, p, rows, each);
  };
  forward_strips(c, m0, m1, c0, c1, add);
}
