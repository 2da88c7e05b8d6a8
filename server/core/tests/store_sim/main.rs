//! The store's machine over a simulated disk: random clients, random completion order, kills, power cuts, and cuts
//! during recovery. One seed is one run; a failure prints its seed.

mod disk;
mod oracle;
mod power_cut;
mod rng;
mod world;
