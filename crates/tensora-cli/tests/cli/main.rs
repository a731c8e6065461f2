//! The promises of the `tensora` command, held by running the built binary.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stderr
)]

mod bench;
mod calibrate;
mod convert;
mod digest;
mod doctor;
mod inspect;
mod interrupted;
mod load;
mod machines;
mod parts;
mod plan;
mod readme;
mod support;
mod usage;
mod verify;
