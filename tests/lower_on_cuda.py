"""Takes code for a GPU through the compiler without one, and prints what came of it as JSON.

    ../shared/tools/fake_cuda/run.sh tests/lower_on_cuda.py

FlexAttention is lowered by torch on fake tensors (nothing is computed), and Triton compiles for an RTX
4090 (sm_89).  {"96 float32 32": bytes of shared memory of a program, or the error ..}
"""

import json
import re
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import preload  # noqa: E402, F401
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import driver

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TARGET = GPUTarget("cuda", 89, 32)


def pretend():
    """A 4090 as torch and Triton ask for it.  Set before the project is imported."""
    card = dict(name="4090", major=8, minor=9, multi_processor_count=128, total_memory=24 << 30)
    card |= dict(warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536)
    card |= dict(max_threads_per_block=1024, L2_cache_size=72 << 20, is_integrated=0, gcnArchName="")
    card |= dict(shared_memory_per_block=49152, shared_memory_per_block_optin=101376)
    answers = dict(is_available=True, is_initialized=True, current_device=0, device_count=1)
    answers |= dict(get_device_name="4090", get_device_capability=(8, 9), _lazy_init=None)
    answers |= dict(get_device_properties=SimpleNamespace(**card), synchronize=None)
    answers |= dict(_exchange_device=0, _maybe_exchange_device=0, set_rng_state=None)
    answers |= dict(get_rng_state=torch.zeros(16, dtype=torch.uint8))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGET,
            get_current_device=lambda: 0,
            get_device_interface=lambda: torch.cuda,
            get_current_stream=lambda *_: 0,
        )
    )


pretend()
from torch._inductor import config as inductor  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask  # noqa: E402

import engine  # noqa: E402
import stage0_model as stage0  # noqa: E402


class Lowered(Exception):
    """Raised where torch would go on to load what it made."""


def shared_memory(source):
    """Bytes of the FlexAttention kernel in a module that Inductor wrote."""
    for name, body in re.findall(r"async_compile.triton\('(\w*flex\w*)', '''(.*?)'''", source, re.S):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.py")
            file.write_text(body)
            spec = spec_from_file_location("kernel", file)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            tuned = getattr(module, name)
            signature, meta = tuned.triton_meta["signature"], tuned.triton_meta
            constants = {k: v for k, v in meta["constants"].items()} | tuned.configs[0].kwargs
            options = dict(num_warps=tuned.configs[0].num_warps, num_stages=tuned.configs[0].num_stages)
            made = compile(ASTSource(tuned.fn, signature, constants), target=TARGET, options=options)
            return made.metadata.shared


def flex(T, dtype, D, H=4, H_kv=2):
    """Lower `attention` on a row of T tokens."""
    made = []

    def stop(graph):
        code = graph.codegen()[0]
        made.append(getattr(code, "value", code))
        raise Lowered

    GraphLowering.compile_to_module = stop
    inductor.force_disable_caches = True
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.randn(1, T, heads, D, device="cuda:0", dtype=dtype) for heads in (H, H_kv, H_kv))
        mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, T, T, device="cpu").to("cuda:0")
        try:
            stage0.attention(q, k, v, mask)
        except Exception as error:
            if not made:
                return f"{type(error).__name__}: {error}"[:90]
    return shared_memory(made[0])


def decode(M, dtype, D, H=4, H_kv=2):
    """Compile the decode kernel with the sizes and tuning that `split_kv_attention` launches it with."""
    launched = {}

    class Launch:
        def __init__(self, name):
            self.kernel = getattr(engine, name)

        def __getitem__(self, grid):
            return lambda *arguments, **sizes: launched.setdefault(self.kernel, sizes)

    M = min(M, engine.most_query_rows(dtype, D)) if hasattr(engine, "most_query_rows") else M
    kernel = engine.split_kv_kernel
    merge = engine.merge_splits_kernel
    engine.split_kv_kernel = Launch("split_kv_kernel")
    engine.merge_splits_kernel = Launch("merge_splits_kernel")
    engine.split_kv_attention(
        torch.zeros(1, H, D, dtype=dtype),
        torch.zeros(1, 2 * H_kv, D, dtype=dtype),
        *[None] * 5,
        [0],
        None,
        None,
        M,
    )
    engine.split_kv_kernel, engine.merge_splits_kernel = kernel, merge
    sizes = launched[kernel]
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict(q=pointer, kv=pointer, q_stride="i32", scale="fp32", partial="*fp32", partial_lse="*fp32")
    signature = {n: "constexpr" if n in sizes else types.get(n, "*i64") for n in kernel.arg_names}
    return compile(ASTSource(kernel, signature, sizes), target=TARGET, options=options).metadata.shared


if __name__ == "__main__":
    torch.set_num_threads(1)
    fp32, bf16 = torch.float32, torch.bfloat16
    found = {f"decode {dtype} 128": decode(128, dtype, 128) for dtype in (fp32, bf16)}
    for T, dtype, D in ((32, fp32, 32), (96, fp32, 32), (96, bf16, 128), (256, fp32, 128), (256, bf16, 128)):
        found[f"flex {T} {dtype} {D}"] = flex(T, dtype, D)
    print(json.dumps(found))
