"""The bundled model as auto-round quantizes it, inside our decoder.

Nothing but the rounding then differs from what `SignRound` gives.
"""

import numpy as np

import qjax

NAMES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def auto_round(model, path, tokens, bits, group, *, steps, batch, seed=0):
    """A decoder with kernels as auto-round leaves them, in float32.

    Args:
      model: the original decoder.
      path: of the same checkpoint.
      tokens: calibration windows, `[windows, time]`.
      bits: width of the integers, which have zero-points.
      group: inputs per scale.
      steps: for each block.
      batch: windows per step.
      seed: of everything that auto-round draws.
    """
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    made, _ = AutoRound(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
        bits=bits,
        group_size=group,
        sym=False,
        dataset=[torch.tensor(row)[None].long() for row in tokens],
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        iters=steps,
        batch_size=batch,
        seed=seed,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize()
    state = made.state_dict()
    params = model.params()
    for name in [p for p in params if p.endswith("kernel") and p[:7] == "layers."]:
        _, layer, kind = name.removesuffix(".kernel").split(".", 2)
        weight = state[f"model.layers.{layer}.{NAMES[kind]}.weight"].float().numpy().T
        groups = weight.reshape(-1, group, weight.shape[1])
        assert max(len(np.unique(g)) for g in groups[0].T) <= 2**bits
        params[name] = weight.copy()
    return qjax.Decoder(model.config, params, dtype="float32")
