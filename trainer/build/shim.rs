//! Compiles the C++ shim and says where libtorch is.

use std::path::{Path, PathBuf};

pub(crate) fn compile() {
    for source in ["shim.cc", "graphs.cc", "shim.h", "guard.h", "gloo_stub"] {
        println!("cargo:rerun-if-changed=src/torch/{source}");
    }
    let lib = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is"));
    let include = lib.join("../include");
    let nccl = std::env::var_os("CARGO_FEATURE_NCCL").is_some();

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false);
    build.define("USE_DISTRIBUTED", None).define("USE_C10D_GLOO", None);
    build.include("src/torch/gloo_stub").include(&include).include(include.join("torch/csrc/api/include"));
    build.files(["src/torch/shim.cc", "src/torch/graphs.cc"]);
    if nccl {
        let nvidia = lib.join("../include-nvidia");
        assert!(
            nvidia.join("nccl.h").exists() && lib.join("libtorch_cuda.so").exists(),
            "feature `nccl` needs the CUDA libtorch: run `make libtorch CUDA=1` (looked in {})",
            lib.display()
        );
        check_nccl(&nvidia.join("nccl.h"), &lib.join("../nccl-version"));
        build.define("USE_C10D_NCCL", None).define("USE_CUDA", None).include(&nvidia).include(nvidia.join("cccl"));
    }
    build.compile("gleaner_c10d");

    // After the shim, which needs them: the linker drops a library that nothing before it has asked for.
    let cuda: &[&str] = if nccl { &["torch_cuda", "c10_cuda"] } else { &[] };
    for library in ["torch_cpu", "c10"].iter().chain(cuda) {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    if nccl {
        // libtorch_cuda.so itself needs libraries that only a machine with a GPU has.
        println!("cargo:rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
    println!("cargo:libtorch={}", lib.display());
}

/// Refuses a header of another NCCL than torch was compiled with. `ncclConfig_t` grows from version to version and lies
/// inside torch's own `ProcessGroupNCCL::Options`, whose destructor is compiled into us: with another header it would
/// take a number for a pointer and free it. A newer NCCL may be loaded, but never compiled against.
fn check_nccl(header: &Path, noted: &Path) {
    println!("cargo:rerun-if-changed={}", header.display());
    println!("cargo:rerun-if-changed={}", noted.display());
    let text = std::fs::read_to_string(header).expect("nccl.h can be read");
    let number = |name: &str| {
        let mut words = text.lines().map(str::split_whitespace);
        words.find_map(|mut line| (line.next() == Some("#define") && line.next() == Some(name)).then(|| line.next())?)
    };
    let [major, minor, patch] =
        ["NCCL_MAJOR", "NCCL_MINOR", "NCCL_PATCH"].map(|name| number(name).expect("nccl.h has its version"));
    let Ok(of_torch) = std::fs::read_to_string(noted) else {
        panic!(
            "{} is missing, which says what NCCL torch was compiled with: run `make libtorch CUDA=1`",
            noted.display()
        );
    };
    assert_eq!(
        format!("{major}.{minor}.{patch}"),
        of_torch.trim(),
        "{} is of another NCCL (left) than torch was compiled with (right): `nvidia-nccl` in deploy/setup/cuda.txt must have the \
         version that torch requires",
        header.display()
    );
}
