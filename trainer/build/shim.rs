//! Compiles the C++ shim and says where libtorch is.

use std::path::PathBuf;

pub(crate) fn compile() {
    for source in ["shim.cc", "shim.h", "gloo_stub"] {
        println!("cargo:rerun-if-changed=src/torch/{source}");
    }
    let lib = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is"));
    let include = lib.join("../include");
    let nccl = std::env::var_os("CARGO_FEATURE_NCCL").is_some();

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false);
    build.define("USE_DISTRIBUTED", None).define("USE_C10D_GLOO", None);
    build.include("src/torch/gloo_stub").include(&include).include(include.join("torch/csrc/api/include"));
    build.file("src/torch/shim.cc");
    if nccl {
        let nvidia = lib.join("../include-nvidia");
        assert!(
            nvidia.join("nccl.h").exists() && lib.join("libtorch_cuda.so").exists(),
            "feature `nccl` needs the CUDA libtorch: run `make libtorch CUDA=1` (looked in {})",
            lib.display()
        );
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
