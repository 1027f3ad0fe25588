//! Names the library, so that programs that are linked with it find it.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libmapdirect-mmap.so.0");
    // What it has of the standard library needs no debugger.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-S");
    println!("cargo::rerun-if-changed=build.rs");
}
