//! The subcommands: each gathers facts, makes a report of them and emits it.

mod bench;
mod bench_plot;
mod calibrate;
mod convert;
mod digest;
mod doctor;
mod files;
mod inspect;
mod load;
mod plan;
mod verify;

pub(crate) use self::bench::bench;
pub(crate) use self::calibrate::calibrate;
pub(crate) use self::convert::convert;
pub(crate) use self::digest::digest;
pub(crate) use self::doctor::doctor;
pub(crate) use self::inspect::inspect;
pub(crate) use self::load::load;
pub(crate) use self::plan::plan;
pub(crate) use self::verify::verify;
