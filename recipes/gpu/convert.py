"""On the machine: a GGUF file's weights as safetensors beside the config and the tokenizer that were written
where it was packed.

    python convert.py FOLDER_WITH_GGUF FILE.gguf FOLDER_WITH_CONFIG_AND_TOKENIZER OUT

transformers 5.17 and 5.23 make different tokenizers of one GGUF file: of SmolLM2's, 5.17 takes <|im_start|>
for the end of a text.
"""

import shutil
import sys
from pathlib import Path


def main(source: Path, name: str, prepared: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    network = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        config=AutoConfig.from_pretrained(prepared),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    network.save_pretrained(out)
    for path in prepared.iterdir():
        shutil.copy(path, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
