//! Compiles the C++ shim, and says where libtorch is: to the linker of this crate's tests, and to the crates of the
//! binaries, whose build scripts read `DEP_GLEANER_C10D_LIBTORCH` (a linker argument reaches only the package that
//! prints it).

#[path = "build/shim.rs"]
mod shim;

fn main() {
    shim::compile();
}
