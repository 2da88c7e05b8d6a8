//! What a daemon costs that has nothing to do.

use std::time::Duration;

use ashlar_tests::daemon::Setup;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::wait;

#[test]
fn a_hundred_idle_volumes_cost_nothing() {
    const SPAN: Duration = Duration::from_secs(6);
    let daemon = Setup::default().start("idle");
    for number in 0..100 {
        daemon.create(&format!("idle-{number}"), "1GiB");
    }
    // Connected, written to, and then silent.
    let mut clients: Vec<_> = (0..100)
        .map(|n| daemon.open(&format!("idle-{n}"), Wishes::SIMPLE))
        .collect();
    for client in &mut clients {
        client.write(0, &[1; 65_536]).unwrap();
        client.flush().unwrap();
    }
    // What was written may be carried to the disk for a moment yet.
    let span = |time: Duration| {
        let before = daemon.usage().processor_time;
        wait::pass(time);
        (daemon.usage().processor_time - before).as_secs_f64() / time.as_secs_f64()
    };
    wait::until(Duration::from_secs(20), "it comes to rest", || {
        let share = span(Duration::from_millis(500));
        if share < 0.01 {
            Ok(())
        } else {
            Err(format!("{:.2} % of a core", share * 100.0))
        }
    });
    let share = span(SPAN);
    let resident = daemon.usage().resident_bytes;
    println!(
        "idle with 100 volumes: {:.3} % of a core, {} MiB resident",
        share * 100.0,
        resident >> 20
    );
    assert!(share < 0.005, "{:.3} % of a core", share * 100.0);
    assert!(resident < 256 << 20, "{resident} bytes resident");
}
