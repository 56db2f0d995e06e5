//! Tells the binary and its tests where to find libtorch when they start: crate `trainer` knows, but a linker argument
//! reaches only the package that prints it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let Some(libtorch) = std::env::var_os("DEP_GLEANER_C10D_LIBTORCH") else { return };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libtorch.display());
    if std::env::var_os("CARGO_FEATURE_NCCL").is_some() {
        // libtorch_cuda.so itself needs libraries that only a machine with a GPU has.
        println!("cargo:rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
}
