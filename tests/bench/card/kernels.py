"""Part "kernels": every kernel against the reference, then its times at the shapes of Mixtral 8x7B."""

from __future__ import annotations

import torch

from engine.backends.cuda.rows import add_rms_norm_launch, rotary_write_launch
from tests.bench.card.attention_times import attention_times
from tests.bench.card.bench import Bench
from tests.bench.card.checks import checks
from tests.bench.card.expert_times import expert_times, route_times
from tests.bench.card.inputs import Cache, normal
from tests.bench.card.report import Part, Setting


@torch.inference_mode()
def kernels(setting: Setting, part: Part) -> None:
    bench = Bench.make(setting, part)
    checks(bench)
    expert_times(bench)
    attention_times(bench)
    route_times(bench)
    row_times(bench)
    assert not bench.wrong, "\n".join(bench.wrong)


def row_times(bench: Bench) -> None:
    """The small kernels: their bytes, read and written."""
    shape, hidden = bench.shape, bench.model.hidden_size
    for num_tokens in (3,) if bench.tiny else (1, 64, 4096):
        written = {"kernel": "rotary_write", "tokens": num_tokens}
        if not bench.is_due("rows", written):
            continue
        x, y, normed = (normal(num_tokens, hidden, device=bench.device, dtype=bench.dtype) for _ in range(3))
        weight = torch.ones(hidden, device=bench.device, dtype=bench.dtype)
        run = add_rms_norm_launch(x, y, weight, 1e-5, normed).run
        normed_keys = {"kernel": "add_rms_norm", "tokens": num_tokens}
        if not bench.part.rows("rows", **normed_keys):
            bench.time("rows", normed_keys, run, num_bytes=4 * x.nbytes)
        cache = Cache.random(-(-num_tokens // 16), 16, shape, device=bench.device, dtype=bench.dtype)
        batch = cache.batch([(num_tokens, num_tokens)])
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = normal(num_tokens, width, device=bench.device, dtype=bench.dtype)
        angles = torch.ones(num_tokens, shape.head_dim // 2, device=bench.device)
        launch = rotary_write_launch(qkv, angles, angles, batch.slot_mapping, cache.keys, cache.values, shape)
        bench.time("rows", written, launch.run, num_bytes=2 * qkv.nbytes)
