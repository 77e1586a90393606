"""Damages small valid files of every format and reads them: a correct read or one `UserError`, nothing else.

    python tests/io/fuzz.py --cases 10000 [--seed 0] [--formats mrc,hdf] [--keep FOLDER]

Every case has 5 s and 1 GiB above what the interpreter takes; a crash of a library ends the process and is
seen by the exit status. The files of the last case stay in the folder; `--only CASE` runs one again.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from particle_explorer.files import UserError
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read

SECONDS = 5
SPARE_BYTES = 1 << 30
INTERESTING = [0, 1, 2, 3, 7, 127, 128, 255, 256, 1024, 2**15 - 1, 2**16, 2**24, 2**31 - 1, 2**32 - 1]
WORDS = [
    *["", "nan", "-1", "0", "1e400", "99999999999999999999", "x@", "@s.mrcs", "-3@s.mrcs", "1@s.mrcs"],
    *["1@../../etc/passwd", "1@/dev/zero", "loop_", "data_", "_rlnImageName"],
    *["#", '"', "'", ";", "\x00", "\r", "é"],
]


def images(n: int = 4, box: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, box, box)).astype("f4")


def corpus(folder: Path) -> dict[str, list[Path]]:
    """Valid files of every format: name → files, the first of which is opened."""
    made: dict[str, list[Path]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    data = images()
    for order in "<>":
        import mrcfile

        path = folder / f"{'little' if order == '<' else 'big'}.mrcs"
        with mrcfile.new(path, overwrite=True) as mrc:
            mrc.set_data(data.astype(f"{order}f4"))
            mrc.set_image_stack()
            mrc.set_extended_header(np.zeros(16, "V1"))
        made[path.stem] = [path]
    write_stack(folder / "s.mrcs", data, 1.5, overwrite=True)
    content = (folder / "s.mrcs").read_bytes()
    (folder / "z.mrcs.gz").write_bytes(gzip.compress(content))
    (folder / "z.mrcs.bz2").write_bytes(bz2.compress(content))
    made["gz"], made["bz2"] = [folder / "z.mrcs.gz"], [folder / "z.mrcs.bz2"]
    np.save(folder / "a.npy", data)
    np.savez_compressed(folder / "a.npz", images=data, label=np.arange(4))
    made["npy"], made["npz"] = [folder / "a.npy"], [folder / "a.npz"]
    (folder / "p31.star").write_text(star("3.1"))
    (folder / "p30.star").write_text(star("3.0"))
    made["star31"], made["star30"] = [folder / "p31.star"], [folder / "p30.star"]
    types = [("uid", "u8"), ("blob/path", "S8"), ("blob/idx", "u4"), ("blob/shape", "u4", 2)]
    poses = [("blob/psize_A", "f4"), ("alignments2D/pose", "f4"), ("alignments2D/shift", "f4", 2)]
    cs = np.zeros(4, [*types, *poses])
    cs["uid"], cs["blob/path"], cs["blob/idx"], cs["blob/psize_A"] = range(1, 5), b"s.mrcs", range(4), 1.5
    with (folder / "p.cs").open("wb") as file:
        np.save(file, cs)
    with (folder / "p_passthrough_particles.cs").open("wb") as file:
        np.save(file, cs)
    made["cs"] = [folder / "p.cs"]
    (folder / "a.spi").write_bytes(spider(data))
    made["spider"] = [folder / "a.spi"]
    hed, img = imagic(data)
    (folder / "a.hed").write_bytes(hed)
    (folder / "a.img").write_bytes(img)
    made["imagic"] = [folder / "a.hed", folder / "a.img"]
    optional(folder, data, made)
    return made


def optional(folder: Path, data: np.ndarray, made: dict[str, list[Path]]) -> None:
    """Those whose libraries may be absent."""
    with contextlib.suppress(ImportError):
        from cryosparc.dataset import CSDAT_FORMAT, Dataset

        Dataset.load(str(folder / "p.cs")).save(str(folder / "c.cs"), format=CSDAT_FORMAT)
        made["csdat"] = [folder / "c.cs"]
    with contextlib.suppress(ImportError):
        import h5py

        with h5py.File(folder / "a.hdf", "w") as file:
            for i, image in enumerate(data):
                group = file.create_group(f"MDF/images/{i}")
                group["image"] = image
                group.attrs["EMAN.apix_x"] = 1.5
        with h5py.File(folder / "b.h5", "w") as file:
            file.create_dataset("x/stack", data=data, chunks=(1, 8, 8), compression="gzip")
        made["eman"], made["h5"] = [folder / "a.hdf"], [folder / "b.h5"]
    with contextlib.suppress(ImportError):
        import tifffile

        tifffile.imwrite(folder / "a.tif", data, photometric="minisblack")
        tifffile.imwrite(folder / "b.tif", data, compression="zlib", photometric="minisblack")
        tifffile.imwrite(folder / "c.tif", data, imagej=True)
        made.update({f"tif-{x}": [folder / f"{x}.tif"] for x in "abc"})
    with contextlib.suppress(ImportError):
        from PIL import Image

        colour = (np.random.default_rng(1).random((16, 16, 3)) * 255).astype("u1")
        Image.fromarray(colour).save(folder / "a.png")
        Image.fromarray(colour).save(folder / "a.jpg")
        made["png"], made["jpg"] = [folder / "a.png"], [folder / "a.jpg"]
    with contextlib.suppress(ImportError):
        import zarr

        for version in (2, 3):
            name = f"v{version}.zarr"
            array = zarr.create_array(folder / name, shape=data.shape, chunks=(1, 8, 8), dtype="f4",
                                      zarr_format=version, overwrite=True)  # fmt: skip
            array[:] = data
            made[f"zarr{version}"] = [folder / name]


def star(dialect: str) -> str:
    """Four particles of s.mrcs."""
    rows = range(1, 5)
    if dialect == "3.0":
        labels = ["rlnImageName", "rlnOriginX", "rlnOriginY", "rlnAnglePsi", "rlnDefocusU"]
        return loop("", labels, [f"{i:06d}@s.mrcs 0.5 -1.25 33.1 12000.0" for i in rows])
    optics = ["rlnOpticsGroup", "rlnImagePixelSize", "rlnImageSize", "rlnVoltage", "rlnSphericalAberration"]
    labels = ["rlnImageName", "rlnOpticsGroup", "rlnOriginXAngst", "rlnOriginYAngst", "rlnAnglePsi"]
    return loop("optics", optics, [f"{group} 1.5 8 300.0 2.7" for group in (1, 2)]) + loop(
        "particles", labels, [f'{i:06d}@s.mrcs {1 + i % 2} 0.5 -1.25 "33.1"' for i in rows]
    )


def loop(name: str, labels: list[str], rows: list[str]) -> str:
    head = "".join(f"_{label} #{i}\n" for i, label in enumerate(labels, 1))
    return f"# version 30001\n\ndata_{name}\n\nloop_\n{head}" + "\n".join(rows) + "\n\n"


def spider(data: np.ndarray, order: str = "<") -> bytes:
    """A SPIDER stack of `(k, n, n)`."""
    n = data.shape[-1]
    lines = -(-1024 // (4 * n))
    labbyt = lines * 4 * n

    def header(is_stack: bool) -> bytes:
        words = np.zeros(labbyt // 4, order + "f4")
        for word, value in {1: 1, 2: n, 5: 1, 12: n, 13: lines, 22: labbyt, 23: 4 * n, 38: 2.5}.items():
            words[word - 1] = value
        if is_stack:
            words[23], words[25] = 2, len(data)
        return words.tobytes()

    return header(True) + b"".join(header(False) + image.astype(order + "f4").tobytes() for image in data)


def imagic(data: np.ndarray, order: str = "<", kind: bytes = b"REAL") -> tuple[bytes, bytes]:
    """(.hed, .img) of `(k, n, n)`."""
    n = data.shape[-1]
    hed = b""
    for i in range(len(data)):
        words = np.zeros(256, order + "i4")
        words[0], words[1], words[11], words[12], words[13] = i + 1, len(data) - 1 - i, n * n, n, n
        record = bytearray(words.tobytes())
        record[56:60] = kind
        hed += bytes(record)
    types = {b"REAL": "f4", b"INTG": "i2", b"PACK": "u1"}
    return hed, data.astype(order + types[kind]).tobytes()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes, numbers and lengths changed, most of them near the beginning."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        if not data:
            break
        reach = len(data) if rng.random() < 0.4 else min(len(data), 320)
        at = rng.randrange(reach)
        act = rng.randrange(6)
        if act == 0:
            data[at] = rng.randrange(256)
        elif act == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif act == 2:
            order = rng.choice(["little", "big"])
            at -= at % 4
            data[at : at + 4] = (rng.choice(INTERESTING) & 0xFFFFFFFF).to_bytes(4, order)
        elif act == 3:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data
        elif act == 4:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
        else:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def damaged_text(content: bytes, rng: random.Random) -> bytes:
    """Words and lines of a text changed."""
    lines = content.decode("utf-8", "replace").split("\n")
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        words = lines[at].split(" ")
        act = rng.randrange(5)
        if act == 0:
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[at] = " ".join(words)
        elif act == 1:
            lines.pop(at)
        elif act == 2:
            lines.insert(at, rng.choice(lines))
        elif act == 3:
            lines[at] = lines[at] + " " + rng.choice(WORDS)
        else:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        if not lines:
            lines = [""]
    return "\n".join(lines).encode("utf-8", "replace")


def damage(path: Path, name: str, rng: random.Random) -> None:
    """Change one file of a format in place."""
    if path.is_dir():
        path = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    content = path.read_bytes()
    is_text = name.startswith("star") or path.suffix == ".json" or path.name.startswith(".z")
    if is_text and rng.random() < 0.7:
        path.write_bytes(
            damaged_text(content, rng) if name.startswith("star") else damaged_json(content, rng)
        )
    elif name == "cs" and rng.random() < 0.5:
        at = rng.randrange(max(1, len(content) - 128)) + 128  # the records
        path.write_bytes(content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :])
    else:
        path.write_bytes(damaged(content, rng))


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """One value changed."""
    try:
        tree = json.loads(content)
    except ValueError:
        return damaged(content, rng)
    if not isinstance(tree, dict) or not tree:
        return damaged(content, rng)
    key = rng.choice(list(tree))
    value = tree[key]
    other: object = rng.choice([None, -1, 0, 2**62, "x", [], {}, [2**40] * 3, [0, 8, 8], "../../x", 1e308])
    if isinstance(value, list) and value and rng.random() < 0.6:
        value[rng.randrange(len(value))] = other
    else:
        tree[key] = other
    return json.dumps(tree).encode()


class TooSlow(Exception):
    pass


def limit_memory() -> None:
    """A reader that believes a header meets a wall instead of taking the machine down."""
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(
            resource.RLIMIT_AS, (used + SPARE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1])
        )


def try_one(path: Path) -> str:
    """Open, look at the first and last image, summarise: "read" or "refused"."""
    try:
        particles = read(path)
        rows = sorted({0, len(particles) - 1})
        for row in rows:
            image = particles.images[row]
            assert image.ndim == 3 and image.dtype == np.float32
            assert image.shape[1] == particles.table["box_px"].iloc[row]
    except UserError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 4000, text
        return "refused"
    return "read"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default="")
    parser.add_argument("--keep", default="")
    parser.add_argument("--only", type=int, default=-1)
    options = parser.parse_args()
    scratch = Path(options.keep or tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    fresh = scratch / "valid"
    made = corpus(fresh)
    for paths in made.values():
        assert try_one(paths[0]) == "read", paths
    wanted = options.formats.split(",") if options.formats else sorted(made)
    contents = {
        file.relative_to(fresh): file.read_bytes() for file in sorted(fresh.rglob("*")) if file.is_file()
    }
    beside = {path.name for path in scratch.iterdir()}
    warnings.simplefilter("ignore")
    logging.disable()
    limit_memory()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TooSlow()))
    counts: Counter[str] = Counter()
    slowest, bad = 0.0, 0
    work = scratch / "case"
    cases = range(options.cases) if options.only < 0 else [options.only]
    for case in cases:
        rng = random.Random(f"{options.seed}-{case}")
        name = wanted[case % len(wanted)]
        opened = made[name][0].relative_to(fresh)
        beside_it = {"s.mrcs", "a.img", *(file.name for file in contents if name == "cs" == file.suffix[1:])}
        needed = [file for file in contents if file.parts[0] == opened.parts[0] or file.name in beside_it]
        for file in needed:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            (work / file).write_bytes(contents[file])
        victim = work / rng.choice([path.relative_to(fresh) for path in made[name]])
        damage(victim, name, rng)
        (scratch / "last.txt").write_text(f"case {case} {name}")
        begin = time.perf_counter()
        if hasattr(signal, "SIGALRM"):
            signal.alarm(SECONDS)
        try:
            counts[f"{name} {try_one(work / opened)}"] += 1
        except BaseException as error:  # what is looked for
            bad += 1
            print(f"case {case} ({name}): {type(error).__name__}: {error}", flush=True)
            if os.environ.get("FUZZ_TRACE"):
                import traceback

                traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            if hasattr(signal, "SIGALRM"):
                signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - begin)
    strange = {path.name for path in scratch.iterdir()} - beside - {"case", "last.txt"}
    written = [name for name in strange if not name.startswith("particle-explorer-")]
    if written:
        bad += 1
        print(f"written outside: {written}")
    for key, count in sorted(counts.items()):
        print(f"{key}: {count}")
    print(f"{options.cases} cases, {bad} bad, slowest {slowest:.2f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
