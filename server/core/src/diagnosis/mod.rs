//! What an administrator is told: why a volume is as it is, what happened, and where the records and the stores disagree.
//!
//! All of it is decided here, from facts that the shell gathers; nothing here asks anybody or changes anything.
//!
//! - `facts`: what is known of a volume and of the nodes it needs; `explain`: from facts to causes; `cause`: their words
//! - `doctor`: where records and stores disagree, and which of two copies is wrong
//! - `events`: what is worth remembering, and the bounded memory of it

mod cause;
pub mod doctor;
pub mod events;
mod explain;
mod facts;

pub use cause::{Cause, Condition, Finding, NodeName, OutBecause};
pub use explain::{Explanation, explain};
pub use facts::{
    CopyFact, Facts, Filling, HeadFact, NodeFact, NodeReport, Standing, StoreFact, StoreTrouble,
    VolumeFact,
};
