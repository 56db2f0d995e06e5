"""Makes libtorch, and Python's torch, out of the wheels that requirements files here pin by hash.

    libtorch.py cpu         target/libtorch: what a program without CUDA links and runs with
    libtorch.py cuda        target/libtorch-cuda: the same with CUDA, NCCL and their headers
    libtorch.py cuda-link   target/libtorch-cuda too, but with stand-ins for NVIDIA's libraries: enough to compile, link
                            and start on a machine without a GPU, at a quarter of the size
    libtorch.py python      torch for Python on the CPU, into the environment that runs this

A folder appears whole or not at all: it is made beside its place and renamed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent.parent / "target"
WHEELS = TARGET / "wheels"

# In torch/lib, but of no use to a program that is neither Python nor CUDA. libtorch.so only names other libraries.
NOT_CPU = r"lib(torch|torch_cuda|torch_cuda_linalg|torch_nvshmem|c10_cuda|caffe2_nvrtc|torch_python|torch_global_deps|shm)\.so"
NOT_CUDA = r"lib(torch|torch_python|torch_global_deps|shm)\.so"
# NVIDIA's libraries that torch's CUDA half names, besides the CUDA runtime and CUPTI, which are small and real everywhere.
ABSENT = (
    "libcublas.so.13 libcublasLt.so.13 libcudnn.so.9 libcufft.so.12 libcufile.so.0 libcurand.so.10 libcusolver.so.12 "
    "libcusparse.so.12 libcusparseLt.so.0 libnccl.so.2 libnvrtc.so.13 libnvshmem_host.so.3"
).split()
# The wheels that hold headers which c10d's NCCL headers include.
HEADERS = r"nvidia-(?:cublas|cusolver|cusparse|cuda-cccl|cuda-crt|nccl-cu13)=="


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def download(requirements, into):
    pip("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", requirements, "-d", into)
    return sorted(Path(into).glob("*.whl"))


def extract(wheel, rules, into):
    """Writes the members that match a rule's pattern to where its replacement says."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            for pattern, place in rules:
                if (match := re.fullmatch(pattern, member.filename)) and not member.is_dir():
                    path = into / match.expand(place)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, open(path, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    break


def link(path, to):
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def symbols(which, libraries):
    """The names that libraries define or leave undefined, without their versions."""
    lines = subprocess.run(["nm", "-D", which, *libraries], check=True, capture_output=True, text=True).stdout.split("\n")
    return {line.split()[-1].partition("@")[0] for line in lines if " " in line}


def stand_in(lib):
    """Fills `lib` with libraries of NVIDIA's names that can be loaded and never called.

    All functions are in one library of another name: the loader would hold a library of the right name to its version
    table. Each of the right name is empty and needs that one.
    """
    real = [path for path in lib.iterdir() if re.fullmatch(r"lib(torch_|c10|cudart|cupti).*\.so(\.\d+)?", path.name)]
    missing = symbols("--undefined-only", real) - symbols("--defined-only", real)
    names = sorted(name for name in missing if re.match(r"(nccl|cu[a-z]*[A-Z]|nvshmem|nvrtc)", name))
    source = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names)
    cc = [*os.environ.get("CXX", "c++").split(), "-x", "c", "-w", "-shared", "-fPIC", "-"]
    shared = lib / "libnvidia-absent.so"
    subprocess.run([*cc, f"-Wl,-soname,{shared.name}", "-o", shared], input=source, text=True, check=True)
    for name in ABSENT:
        flags = ["-x", "none", "-Wl,--no-as-needed", f"-Wl,-soname,{name}", shared, "-o", lib / name]
        subprocess.run([*cc, *flags], input="", text=True, check=True)


def note_nccl(view, torch):
    """Notes which NCCL torch was compiled with, so that our shim is compiled with no other: NCCL's structs grow with its version,
    and some of them lie inside torch's own."""
    with zipfile.ZipFile(torch) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        version = re.search(r"(?m)^Requires-Dist: nvidia-nccl-cu\d+==([0-9.]+)", wheel.read(metadata).decode())[1]
    (view / "nccl-version").write_text(version + "\n")


def finish(view, libraries):
    """`libtorch.so` is all that torch-sys asks the linker for, so it stands for what is really there."""
    (view / "lib/libtorch.so").write_text(f"INPUT({' '.join(libraries)})\n")
    for gomp in (view / "lib").glob("libgomp*.so.1*"):
        link(view / "lib/libgomp.so", gomp.name)
    (view / "build-version").write_text(re.search(r"torch==(\S+)", (HERE / "libtorch.txt").read_text())[1] + "\n")


def place(view, name):
    """Renames the finished folder into place."""
    old, final = view.parent / "old", TARGET / name
    if final.exists():
        final.rename(old)
    view.rename(final)
    print(f"{final.relative_to(TARGET.parent)}: {size(final) >> 20} MiB")


def size(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def cpu(scratch):
    view = scratch / "view"
    for wheel in download(HERE / "libtorch.txt", WHEELS):
        extract(wheel, [
            (rf"torch/lib/(?!{NOT_CPU}$)(lib[^/]*\.so[^/]*)", r"lib/\2"),
            (r"torch\.libs/([^/]*)", r"lib/\1"),
            (r"torch/(include/.*)", r"\1"),
            (r"nvidia/cu13/lib/(lib(cudart|cupti)\.so[^/]*)", r"lib/\1"),
        ], view)
    finish(view, ["libtorch_cpu.so", "libc10.so"])
    place(view, "libtorch")


def cuda(scratch, real=True):
    view = scratch / "view"
    headers = (r"nvidia/[^/]*/include/(.*)", r"include-nvidia/\1")
    # The CPU view's files, which nobody writes to, are shared, not copied.
    shutil.copytree(TARGET / "libtorch", view, symlinks=True, copy_function=os.link)
    (view / "build-version").unlink()
    (view / "lib/libtorch.so").unlink()
    for wheel in download(HERE / "libtorch.txt", WHEELS):
        extract(wheel, [(rf"torch/lib/(?!{NOT_CUDA}$)(lib[^/]*(cuda|nvrtc|nvshmem)[^/]*\.so)", r"lib/\2"), headers], view)
        if wheel.name.startswith("torch-"):
            note_nccl(view, wheel)
    wanted = HERE / "cuda.txt"
    if not real:
        blocks = re.findall(rf"(?m)^{HEADERS}.*\n(?: .*\n)*", wanted.read_text())
        wanted = scratch / "headers.txt"
        wanted.write_text("".join(blocks))
    for wheel in download(wanted, scratch / "wheels"):
        extract(wheel, [headers] + real * [(r"nvidia/[^/]*/lib/([^/]*\.so[^/]*)", r"lib/\1")], view)
        wheel.unlink()
    if not real:
        stand_in(view / "lib")
    finish(view, ["libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so"])
    place(view, "libtorch-cuda")


def python(_):
    download(HERE / "libtorch.txt", WHEELS)
    pip("install", "--quiet", "--require-hashes", "--no-deps", "-r", HERE / "python.txt")
    pip("install", "--quiet", "--no-index", "--find-links", WHEELS, "--no-deps", "-r", HERE / "libtorch.txt")
    site = Path(sysconfig.get_path("purelib"))
    lib = site / "torch/lib"
    for name in ("cudart", "cupti"):
        for path in (site / "nvidia/cu13/lib").glob(f"lib{name}.so.*"):
            link(lib / path.name, path)
    stand_in(lib)
    # What is in target/libtorch already need not be on the disk twice.
    for path in (TARGET / "libtorch/lib").glob("libtorch_*.so"):
        (lib / path.name).unlink()
        os.link(path, lib / path.name)
    shutil.rmtree(site / "torch/include")
    subprocess.run([sys.executable, "-c", "import torch; print('torch', torch.__version__)"], check=True)


if __name__ == "__main__":
    commands = {"cpu": cpu, "cuda": cuda, "cuda-link": lambda scratch: cuda(scratch, real=False), "python": python}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="libtorch-", dir=TARGET) as scratch:
        try:
            commands[sys.argv[1]](Path(scratch))
        except subprocess.CalledProcessError as error:
            sys.exit(f"libtorch.py: failed: {' '.join(map(str, error.cmd))}")
