//! The head: the one writer of a volume.
//!
//! It gives every change its version, keeps conflicting requests apart, cuts requests into pieces of chunks, and knows
//! what a flush still has to make durable. It does no I/O: the caller asks [`Head::begin`], does the work at once or
//! later, and says [`Head::finish`].

mod durability;
mod head;
mod lock;
mod pace;
mod pieces;

pub use durability::{FlushPlan, StoreSlot};
pub use head::{Began, EPOCH_RESERVE, Head, HeadSpec, Refusal, ResizeRefusal, Started};
pub use lock::{Access, BlockRange, Ticket};
pub use pace::Pace;
pub use pieces::{Piece, Pieces, blocks_touched, whole_blocks};
