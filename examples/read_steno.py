"""Reads `.steno` files with numpy and the standard library alone: what docs/format.md says, and nothing of steno."""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np

WIDTHS = {"uint8": 1, "int32": 4, "bfloat16": 2, "float16": 2, "float32": 4}


class File:
    """The header, and the matrices of a group by their numbers."""

    def __init__(self, path):
        raw = Path(path).read_bytes()
        magic, version, zero, length, wanted = struct.unpack("<8sIIQ16s", raw[:40])
        if magic != b"\x93STENO\r\n" or version != 1 or zero or length > min(64 << 20, len(raw) - 40):
            raise ValueError(f"{path} is no .steno file of version 1")
        self.data = raw[:24] + raw[40 : 40 + length]
        self.header, self.tables = json.loads(self.checked(0, 24 + length, wanted.hex())[24:]), []
        self.data = raw[-(-(40 + length) // 64) * 64 :]
        stored, at = self.checked(*self.header["tables"]), 0
        for array in self.header["arrays"]:
            num_contexts = (len(array["offsets"]) - 1) * array["columns"] // array["context_columns"]
            self.tables.append([])
            for count in array["tables"]:
                of_context, at = np.frombuffer(stored, np.uint8, num_contexts, at), at + num_contexts
                frequencies = np.zeros((count, 256), np.int64)
                for row in frequencies:
                    has = np.unpackbits(np.frombuffer(stored, np.uint8, 32, at), bitorder="little").astype(bool)
                    row[has] = np.frombuffer(stored, "<u2", has.sum(), at + 32)
                    at += 32 + 2 * int(has.sum())
                self.tables[-1].append((of_context, frequencies))

    def checked(self, offset, length, wanted):
        part = self.data[offset : offset + length]
        if len(part) != length or hashlib.blake2b(part, digest_size=16).hexdigest() != wanted:
            raise ValueError("the file was cut or changed")
        return part

    def group(self, group):
        arrays = {i: a for i, a in enumerate(self.header["arrays"]) if a["group"] == group}
        planes = {i: np.zeros((WIDTHS[a["dtype"]], a["offsets"][-1], a["columns"]), "u1") for i, a in arrays.items()}
        for _, chunk, *place in (c for c in self.header["chunks"] if c[0] == group):
            body, at = self.checked(*place), 0
            for i, array in arrays.items():
                ends, tokens = array["offsets"], array["row_tokens"]
                low = chunk * (n := 256 // tokens if tokens else ends[-1])
                rows = [slice(min(a + low, b), min(a + low + n, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
                if any(r.stop > r.start for r in rows):
                    for plane, tables in zip(planes[i], self.tables[i], strict=True):
                        at = read_plane(body, at, plane, array, rows, *tables)
        return {i: join(planes[i], array["dtype"]) for i, array in arrays.items()}


def read_plane(body, at, plane, array, rows, of_context, frequencies):
    width, per_head = array["context_columns"], array["columns"] // array["context_columns"]
    lengths = np.repeat([(r.stop - r.start) * width for r in rows], per_head)
    symbols = np.zeros(0, np.uint8)
    if len(frequencies):
        size, at = int.from_bytes(body[at : at + 4], "little"), at + 4
        if size:
            runs = [int(lengths[of_context == table].sum()) for table in range(len(frequencies))]
            symbols = rans(body[at : at + size], runs, frequencies)
        at += size
    num_raw, order = int(lengths.sum()) - len(symbols), np.argsort(of_context, kind="stable")
    symbols = np.concatenate([symbols, np.frombuffer(body, np.uint8, num_raw, at)])
    for context, part in zip(order.tolist(), np.split(symbols, np.cumsum(lengths[order])[:-1]), strict=True):
        head, column = divmod(context, per_head)
        plane[rows[head], column * width : (column + 1) * width] = part.reshape(-1, width)
    return at + num_raw


def rans(stream, runs, frequencies):
    states = np.frombuffer(stream, "<u4", 32).astype(np.int64)
    words, at, found = np.frombuffer(stream, "<u2", offset=128).astype(np.int64), 0, [np.zeros(0, np.uint8)]
    for length, frequency in zip(runs, frequencies, strict=True):
        symbol_of_slot, starts = np.repeat(np.arange(256), frequency), np.cumsum(frequency) - frequency
        for first in range(0, length, 32):
            x = states[: min(32, length - first)]
            symbols = symbol_of_slot[slot := x & 4095]
            x[:] = frequency[symbols] * (x >> 12) + slot - starts[symbols]
            low = np.flatnonzero(x < 65536)
            x[low], at = x[low] << 16 | words[at : at + len(low)], at + len(low)
            found.append(symbols.astype(np.uint8))
    if at != len(words) or (states != 65536).any():
        raise ValueError("a stream does not end where it should")
    return np.concatenate(found)


def join(planes, dtype):
    if dtype in ("bfloat16", "float32"):
        exponent, rest = planes[0], planes[1]
        planes = [rest & 128 | exponent >> 1, (exponent & 1) << 7 | rest & 127, *planes[2:]]
    bits = np.zeros(planes[0].shape, np.uint32)
    for plane in planes:
        bits = bits << 8 | plane
    narrow = bits.astype(f"<u{len(planes)}")
    return (bits << 16).view(np.float32) if dtype == "bfloat16" else narrow.view(np.dtype(dtype).newbyteorder("<"))


def pages(fields, own, side, dim):
    """The keys or values `[P * 64, D]` of pages; side: "key" or "value"."""
    b, size, params = fields["bits"], fields[f"{side}_group"], own[f"{side}_params"]
    rows, columns = (dim, 64) if side == "key" else (64, dim)
    lines = own[f"{side}_codes"].reshape(len(params), -(-rows * b // 32), -1, 16, 4)  # [P, groups, blocks, lane, i]
    parts = np.stack([lines >> (j * b) & (2**b - 1) for j in range(8 // b)], 2)  # [P, groups, j, blocks, lane, i]
    codes = parts.transpose(0, 1, 2, 5, 3, 4).reshape(len(params), -1, lines.shape[2] * 16)[:, :rows, :columns]
    codes = codes.transpose(0, 2, 1) if side == "key" else codes  # [P, 64, D]
    if "codebook" in fields:
        scales = params.astype(np.float32)
        if fields["byte_scales"]:
            sign, exponent, mantissa = 1 - 2.0 * (params >> 7), (params >> 3 & 15).astype(int), params & 7  # E4M3
            scales = sign * np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
            scales = scales[:, 4:] * np.ascontiguousarray(params[:, :4]).view("<f4")
        scales = scales.reshape(len(codes), -1, 64).repeat(min(size, dim), 1)[:, :dim].transpose(0, 2, 1)
        return (np.float32(fields["levels"])[codes] * scales).reshape(-1, dim)
    wide = params.astype(np.float32).reshape(len(codes), 2, -1, dim if side == "key" else 64).repeat(size, 2)
    scale, least = wide[:, :, :columns].transpose((1, 0, 2, 3) if side == "key" else (1, 0, 3, 2))  # [P, 64, D]
    return (codes * scale + least).reshape(-1, dim)


def coded(fields, arrays, lengths, dim):
    """The values `[n, D]` of each head of a layer at a quality level, without its first tokens."""
    size, heads, at, recent_at = max(1, fields["heads_together"]), [], 0, 0
    for p, n in enumerate(lengths[::size]):
        x = arrays[fields["coarse"]][at : at + n].astype(np.int64) - 128
        old, unit = max(0, n - 128), np.ones((n, 1))
        x[old:] = 3 * x[old:] + arrays[fields["recent"]][recent_at : recent_at + n - old] - 1
        unit[old:] /= 3
        for number in (i for i in fields["refinements"] if i in arrays):
            x, unit = 3 * x + arrays[number][at : at + n] - 1, unit / 3
        x, at, recent_at = x * unit * arrays[fields["scales"]][p], at + n, recent_at + n - old
        if fields["heads_together"]:
            x = x @ (arrays[fields["basis"]].reshape(-1, size * dim, size * dim)[p].astype(np.float64) - 128)
        heads += np.split(x + arrays[fields["mean"]][p], size, axis=1)
    return heads


def rotated(x, positions, frequencies):
    half = len(frequencies)
    z = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(1j * np.outer(positions, frequencies))
    return np.concatenate([z.real, z.imag, x[:, 2 * half :]], 1)


def read_layer(entry, arrays):
    """Lists over heads: positions, keys, values, log counts."""
    heads, dim = range(entry["kv_heads"]), entry["head_dim"]
    positions = [np.arange(entry["seen_tokens"]) for _ in heads]
    if entry["kept"] is not None:
        kept, size = np.unpackbits(arrays[entry["kept"]], axis=1, bitorder="little"), entry["prompt_tokens"]
        positions = [np.concatenate([np.flatnonzero(row), positions[0][size:]]) for row in kept]
    found = [[[] for _ in heads] for _ in range(3)]

    def add(offsets, keys, values, logs=0):
        for into, x in zip(found, (keys, values, np.broadcast_to(logs, len(keys))), strict=True):
            for h in heads:
                into[h].append(np.asarray(x[offsets[h] : offsets[h + 1]], np.float32))

    if "coded" in entry:
        fields, lengths, first = entry["coded"], [len(p) for p in positions], [min(4, len(p)) for p in positions]
        add(np.cumsum([0, *first]), *(arrays[i] for i in fields["first"]))
        others = [n - f for n, f in zip(lengths, first, strict=True)]
        keys, values = (coded(fields[side], arrays, others, dim) for side in ("keys", "values"))
        if fields["frequencies"] is not None:
            keys = [rotated(x, p[f:], fields["frequencies"]) for x, p, f in zip(keys, positions, first, strict=True)]
        add(np.cumsum([0, *others]), np.concatenate(keys), np.concatenate(values))
        if fields["log_counts"] is not None:
            found[2] = [[x] for x in np.split(arrays[fields["log_counts"]][:, 0], np.cumsum(lengths)[:-1])]
    for fields in entry.get("segments", []):
        own, offsets = {name: arrays[i] for name, i in fields["arrays"].items()}, np.array(fields["offsets"])
        form, turn = fields["form"].removeprefix("hadamard "), own.get("basis", np.eye(dim, dtype=np.float32)).T
        logs = own["log_counts"].reshape(-1) if "log_counts" in own else 0
        if form == "pages":
            own |= {"keys": pages(fields, own, "key", dim), "values": pages(fields, own, "value", dim)}
        add(offsets * (64 if form == "pages" else 1), own["keys"] @ turn, own["values"] @ turn, logs)
    if "tail" in entry:
        keys, values = (arrays[i] for i in entry["tail"])
        add(np.arange(len(heads) + 1) * (len(keys) // len(heads)), keys, values)
    return [positions] + [[np.concatenate(x) for x in side] for side in found]


def read(path, refinements=None):
    """The header, the tokens, and of each layer what `read_layer` gives; refinements: how many at most are read."""
    file = File(path)
    entries, layers = file.header["cache"]["layers"], []
    for idx, entry in enumerate(entries):
        stored, arrays = len(entry["coded"]["keys"]["refinements"]) if "coded" in entry else 0, {}
        for r in range(1 + (stored if refinements is None else min(refinements, stored))):
            arrays |= file.group(r * len(entries) + idx + 1)
        layers.append(read_layer(entry, arrays))
    return file.header, file.group(0)[file.header["cache"]["tokens"]][:, 0].tolist(), layers


if __name__ == "__main__":
    header, tokens, layers = read(sys.argv[1])
    print(header["model"]["name"], header["recipe"], header["level"], f"{len(tokens)} tokens", f"{len(layers)} layers")
