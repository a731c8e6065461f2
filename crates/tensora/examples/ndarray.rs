//! Hands loaded tensors to `ndarray` without copying them.
//!
//! `cargo run --release -p tensora --example ndarray -- CHECKPOINT`

use std::io::Write;

use ndarray::{ArrayViewD, IxDyn};
use tensora::{Dtype, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os()
        .nth(1)
        .ok_or("usage: ndarray CHECKPOINT")?;
    let checkpoint = tensora::load(path)?;
    let mut out = std::io::stdout().lock();
    for tensor in &checkpoint {
        match view_f32(tensor) {
            Some(view) => writeln!(
                out,
                "{} {:?} mean {:.6}",
                tensor.name(),
                view.shape(),
                view.mean().unwrap_or(f32::NAN)
            ),
            None => writeln!(
                out,
                "{} {:?} {}",
                tensor.name(),
                tensor.shape(),
                tensor.dtype()
            ),
        }?;
    }
    Ok(())
}

/// The tensor as an array of `f32` in the very memory that it was loaded into, or `None` for another
/// dtype, a strided tensor, or, in a file that does not align its data, an unaligned address.
fn view_f32(tensor: &Tensor) -> Option<ArrayViewD<'_, f32>> {
    if tensor.dtype() != Dtype::F32 || !tensor.is_contiguous() {
        return None;
    }
    let elements = bytemuck::try_cast_slice(tensor.bytes()).ok()?;
    ArrayViewD::from_shape(IxDyn(tensor.shape()), elements).ok()
}
