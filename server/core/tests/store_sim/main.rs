//! The store's machine over a simulated disk: random clients, random completion order, kills, power cuts, and cuts
//! during recovery. One seed is one run; a failure prints its seed.

mod cleaning;
mod disk;
mod faults;
mod opening;
mod oracle;
mod power_cut;
mod ram;
mod restart;
mod rng;
mod scrub;
mod unread;
mod versions;
mod world;
