//! Compiles the C++ shim and ONNX's messages, and says where libtorch is: to the linker of this crate's tests, and to the crates of the
//! binaries, whose build scripts read `DEP_GLEANER_C10D_LIBTORCH` (a linker argument reaches only the package that prints it).

#[path = "build/shim.rs"]
mod shim;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    shim::compile();
    println!("cargo:rerun-if-changed=src/learn/onnx.proto");
    prost_build::compile_fds(protox::compile(["onnx.proto"], ["src/learn"])?)?;
    Ok(())
}
