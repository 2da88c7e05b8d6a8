//! Gathers what `ashlar_core::diagnosis` decides on: from this daemon, from the records, and from the other nodes, each of
//! which is waited for a short while and no longer.

mod gather;
mod wire;

pub(crate) use gather::{DiagnosisError, explain, report};
pub(crate) use wire::{event, explanation, report_message};
