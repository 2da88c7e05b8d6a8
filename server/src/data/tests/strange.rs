//! Files that are no stores, or not any more.

use super::*;

#[test]
fn strange_files_and_vanished_stores_are_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let runtime = runtime();
    let mut config = config(dir.path(), 1);
    let path = config.stores[0].path.clone();
    let start = |config: &DataConfig| runtime.block_on(DataPlane::start(config.clone())).map(drop);

    std::fs::write(&path, b"a letter to my aunt").expect("write");
    assert!(matches!(start(&config), Err(StartError::NotAStore { .. })));
    assert_eq!(std::fs::read(&path).expect("read"), b"a letter to my aunt");
    std::fs::remove_file(&path).expect("remove");

    let plane = runtime
        .block_on(DataPlane::start(config.clone()))
        .expect("start");
    let id = plane.stores()[0].id;
    assert!(
        matches!(start(&config), Err(StartError::File(_))),
        "open in another daemon"
    );
    runtime.block_on(plane.drain());

    config.stores[0].expected = Some(ashlar_core::units::StoreId(Uuid::from_u128(1)));
    assert!(matches!(start(&config), Err(StartError::Swapped { .. })));
    config.stores[0].expected = Some(id);
    config.node = NodeId(Uuid::from_u128(8));
    assert!(matches!(start(&config), Err(StartError::Store { .. })));
    config.node = NODE;
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    let file = file.expect("its file");
    let whole = file.metadata().expect("its length").len();
    file.set_len(whole / 2).expect("cut off");
    let Err(StartError::Store { source, .. }) = start(&config) else {
        panic!("opened without its end");
    };
    let OpenError::Truncated { want, have } = source else {
        panic!("{source}");
    };
    assert!(have == whole / 2 && have < want && want <= whole);
    drop(file);
    std::fs::remove_file(&path).expect("remove");
    assert!(matches!(start(&config), Err(StartError::Emptied { .. })));
    assert!(!path.exists());
}
