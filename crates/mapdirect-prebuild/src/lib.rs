//! Nothing: this crate is its build script, which says in one line what is
//! missing to build the bpf gate.
//!
//! `mapdirect-sys` depends on it (feature `bpf`), although it has no use for
//! it: cargo builds first what most others wait for. So the script runs before
//! libbpf's own, which would end in the errors of a C compiler.
