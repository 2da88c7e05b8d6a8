//! Gathers what `ashlar_core::diagnosis` decides on: from this daemon, from the records, and from the other nodes, each of
//! which is waited for a short while and no longer.

mod doctor;
mod gather;
mod peers;
mod wire;

pub(crate) use doctor::{Doctor, Orders};
pub(crate) use gather::{DiagnosisError, explain, report};
pub(crate) use peers::{digests, distrust, drop_orphan, holdings, sums};
pub(crate) use wire::{
    digest_message, event, explanation, findings_message, holdings_message, report_message,
    sums_message,
};
