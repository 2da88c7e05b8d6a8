use super::*;

fn node(n: u128) -> NodeId {
    NodeId(Uuid::from_u128(n))
}

fn at<R>(record: R) -> Versioned<R> {
    Versioned {
        record,
        changed_at: Revision(7),
    }
}

fn token(used_by: Option<TokenUse>) -> Versioned<TokenRecord> {
    at(TokenRecord {
        expires_at_unix_ms: 1000,
        used_by,
    })
}

fn joiner(n: u128, key: &str) -> Joiner {
    Joiner {
        node: node(n),
        public_key_sha256: key.to_owned(),
        address: None,
        labels: BTreeMap::new(),
    }
}

fn member(n: u128, state: MemberState) -> Versioned<MemberRecord> {
    at(MemberRecord {
        id: node(n),
        joined_at_unix_ms: 1,
        state,
        address: None,
        is_authority: false,
        labels: BTreeMap::new(),
        draining: false,
    })
}

#[test]
fn a_token_is_good_for_one_node_and_one_key_until_it_expires() {
    let fresh = token(None);
    let one = joiner(1, "a");
    let joined = join("t", Some(&fresh), None, &one, 999)
        .expect("joins")
        .expect("a change");
    assert_eq!(joined.effects.len(), 2);
    assert_eq!(join("t", None, None, &one, 1), Err(JoinError::UnknownToken));
    assert_eq!(
        join("t", Some(&fresh), None, &one, 1000),
        Err(JoinError::ExpiredToken)
    );

    let used = token(Some(TokenUse {
        node: node(1),
        public_key_sha256: "a".to_owned(),
    }));
    let active = member(1, MemberState::Active);
    assert_eq!(join("t", Some(&used), Some(&active), &one, 1), Ok(None));
    for other in [joiner(2, "a"), joiner(1, "b")] {
        assert_eq!(
            join("t", Some(&used), None, &other, 1),
            Err(JoinError::UsedToken)
        );
    }
    let removed = member(1, MemberState::Removed);
    for token in [&used, &fresh] {
        assert_eq!(
            join("t", Some(token), Some(&removed), &one, 1),
            Err(JoinError::Removed { node: node(1) })
        );
    }
    assert_eq!(
        join("t", Some(&fresh), Some(&active), &one, 1),
        Err(JoinError::AlreadyIn { node: node(1) })
    );
}

#[test]
fn a_node_is_removed_only_when_nothing_is_lost_by_it() {
    let one = member(1, MemberState::Active);
    assert!(matches!(
        remove(&one, node(1), &Holdings::default(), &[node(2)]),
        Err(MemberError::Itself { .. })
    ));
    let name = |number| VolumeName::parse(&format!("v{number}")).expect("a name");
    let held = |volumes, copied, serves| Holdings {
        stores: 1,
        volumes,
        copied,
        copies: copied,
        serves: (0..serves).map(name).collect(),
    };
    assert!(matches!(
        remove(&one, node(2), &held(3, 1, 1), &[node(2)]),
        Err(MemberError::HoldsVolumes {
            stores: 1,
            volumes: 3,
            ..
        })
    ));
    assert!(matches!(
        remove(&one, node(2), &held(0, 2, 1), &[node(2)]),
        Err(MemberError::HoldsCopies { volumes: 2, .. })
    ));
    assert!(matches!(
        remove(&one, node(2), &held(0, 0, 1), &[node(2)]),
        Err(MemberError::Serves { volumes, .. }) if volumes == [name(0)]
    ));
    let told = |serves| {
        let refused = remove(&one, node(2), &held(0, 0, serves), &[node(2)]);
        refused.expect_err("refused").to_string()
    };
    assert!(
        told(2).contains("serves 2 volume(s): v0, v1; open"),
        "{}",
        told(2)
    );
    assert!(told(10).contains("v8, v9; open"), "{}", told(10));
    assert!(
        told(12).contains("12 volume(s)") && told(12).contains("v9 and 2 more;"),
        "{}",
        told(12)
    );
    assert!(matches!(
        remove(&one, node(2), &held(0, 0, 0), &[node(1)]),
        Err(MemberError::LastAuthority { .. })
    ));
    assert!(
        remove(&one, node(2), &held(0, 0, 0), &[node(1), node(2)])
            .expect("removed")
            .is_some()
    );
    let removed = member(1, MemberState::Removed);
    assert_eq!(
        remove(&removed, node(2), &Holdings::default(), &[]),
        Ok(None)
    );
}

#[test]
fn a_node_is_drained_and_no_longer() {
    let one = member(1, MemberState::Active);
    let change = drain(&one, true).expect("drains").expect("a change");
    assert_eq!(change.conditions.len(), 1);
    assert_eq!(drain(&one, false), Ok(None));
    let mut draining = one.clone();
    draining.record.draining = true;
    assert_eq!(drain(&draining, true), Ok(None));
    assert!(drain(&draining, false).expect("ends").is_some());
    assert!(matches!(
        drain(&member(1, MemberState::Removed), true),
        Err(MemberError::Removed { .. })
    ));
}

#[test]
fn labels_and_names_are_checked() {
    let one = member(1, MemberState::Active);
    let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    };
    assert!(
        label(
            &one,
            &labels(&[("zone", "eu-1a"), ("rack", "r7")]),
            &["x".into()]
        )
        .is_ok()
    );
    for wrong in [("", "a"), ("zone", ""), ("Zone", "a"), ("zone", "a b")] {
        assert!(label(&one, &labels(&[wrong]), &[]).is_err(), "{wrong:?}");
    }
    for good in ["a", "db-1", "0"] {
        assert_eq!(check_client_name(good), Ok(()), "{good}");
    }
    for wrong in ["", "-a", "a-", "A", "a.b", "ä", &"a".repeat(64)] {
        assert!(check_client_name(wrong).is_err(), "{wrong}");
    }
}
