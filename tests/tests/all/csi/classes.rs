//! What a class asks for, and what is told of it.

use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Claim, Driver, mounted, raw};
use ashlar_tests::daemon::Setup;
use ashlar_tests::tool::Tool;
use tonic::Code;

#[test]
fn space_is_told_for_a_class_as_the_provisioner_hands_it_over() {
    let driver = Driver::start("csi-space", Setup::default());
    let own = ("csi.storage.k8s.io/fstype", "ext4");
    let free = driver.space(&[own, ("writeThrough", "true")]);
    assert!(free.expect("told") > 0);
    let (refused, why) = driver
        .space(&[own, ("write_through", "true")])
        .expect_err("no parameter");
    assert_eq!(refused, Code::InvalidArgument);
    assert!(why.contains("write_through"), "{why}");
}

#[test]
fn what_is_confirmed_of_a_volume_is_what_it_is() {
    let driver = Driver::start("csi-confirmed", Setup::default());
    let capability = || mounted("xfs", Mode::SingleNodeWriter);
    let class = [
        ("filesystem", "xfs"),
        ("writeThrough", "true"),
        ("iops", "100"),
    ];
    let size = 320 << 20;
    let claim = Claim::of_class(&driver, "confirmed", size, capability(), &class).expect("created");
    let ask = |capability, parameters: &[(&str, &str)], mutable: &[(&str, &str)]| {
        let answer = driver.validate(&claim.id, capability, parameters, mutable);
        answer.expect("judged")
    };
    let confirmed = ask(capability(), &class, &[("iops", "100")]).expect("as it was made");
    assert_eq!(confirmed.volume_capabilities, [capability()]);
    assert_eq!(confirmed.parameters.len(), class.len());
    ask(raw(Mode::SingleNodeWriter), &[], &[]).expect("nothing else was asked");
    // A limit that was changed is what it is now; what the class said stays what it said.
    driver
        .modify(&claim.id, &[("iops", "50")])
        .expect("modified");
    ask(capability(), &class, &[("iops", "50")]).expect("as it is now");
    for (parameters, mutable, word) in [
        (&[("writeThrough", "false")][..], &[][..], "writeThrough"),
        (&[("replicas", "3")], &[], "replicas"),
        (&[("unheard-of", "1")], &[], "unheard-of"),
        (&[], &[("iops", "100")], "iops"),
        (&[], &[("replicas", "1")], "replicas"),
    ] {
        let why = ask(capability(), parameters, mutable).expect_err("not as asked");
        assert!(why.contains(word), "{word}: {why}");
    }
    let several = mounted("xfs", Mode::MultiNodeMultiWriter);
    assert!(!ask(several, &[], &[]).expect_err("no such mode").is_empty());
    let unknown = driver.validate(
        "00000000-0000-4000-8000-000000000000",
        capability(),
        &[],
        &[],
    );
    assert_eq!(unknown.expect_err("there is none").0, Code::NotFound);
    driver.delete(&claim.id).expect("deleted");
}

#[test]
fn the_class_says_which_file_system_it_is() {
    let driver = Driver::start("csi-class", Setup::default());
    let size = 320 << 20;
    let capability = || mounted("", Mode::SingleNodeWriter);
    let xfs = &[("filesystem", "xfs")];
    let mut claim = Claim::of_class(&driver, "xfs", size, capability(), xfs).expect("created");
    claim.publish_context = claim.controller_publish(&driver, false).expect("published");
    claim.bring_up(&driver);
    let found = Tool::new("findmnt")
        .args(["-no", "FSTYPE"])
        .arg(&claim.target);
    assert_eq!(found.succeed().trim(), "xfs");
    claim.take_away(&driver);
    let ext4 = mounted("ext4", Mode::SingleNodeWriter);
    let refused = Claim::of_class(&driver, "both", size, ext4, xfs).err();
    let (refused, why) = refused.expect("two that differ");
    assert_eq!(refused, Code::InvalidArgument);
    assert!(why.contains("xfs") && why.contains("ext4"), "{why}");
}
