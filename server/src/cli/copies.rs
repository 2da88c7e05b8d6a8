//! Where the copies of a volume are, and what its answers are worth with those in sync.

use ashlar_proto::admin;
use serde::Serialize;

use super::{output, size::human, view::Volume};

/// The copies of the chunks that are dealt to one entry of the placement.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ReplicaSet {
    pub(super) replicas: Vec<Replica>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Replica {
    pub(super) node_id: String,
    pub(super) store_id: String,
    /// `in-sync`, `out` or `joining`.
    pub(super) state: &'static str,
    /// False also where the head is not in the daemon that was asked.
    pub(super) linked: bool,
    /// Goes when others suffice.
    pub(super) leaving: bool,
    /// Only where the head answers: what was copied, and what has yet to be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) filling: Option<Filling>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Filling {
    copied_bytes: u64,
    left_bytes: u64,
}

impl Replica {
    fn is_in_sync(&self) -> bool {
        self.state == "in-sync"
    }
}

impl From<admin::ReplicaSet> for ReplicaSet {
    fn from(set: admin::ReplicaSet) -> ReplicaSet {
        let replica = |replica: admin::Replica| Replica {
            state: match replica.state() {
                admin::ReplicaState::InSync => "in-sync",
                admin::ReplicaState::Out => "out",
                admin::ReplicaState::Joining => "joining",
                admin::ReplicaState::Unspecified => "unknown",
            },
            node_id: replica.node_id,
            store_id: replica.store_id,
            linked: replica.linked,
            leaving: replica.leaving,
            filling: replica.filling.then_some(Filling {
                copied_bytes: replica.copied_bytes,
                left_bytes: replica.left_bytes,
            }),
        };
        ReplicaSet {
            replicas: set.replicas.into_iter().map(replica).collect(),
        }
    }
}

/// Copies in sync of the worst set. `None`: the volume has no replica sets.
fn fewest_in_sync(volume: &Volume) -> Option<usize> {
    let in_sync = |set: &ReplicaSet| set.replicas.iter().filter(|r| r.is_in_sync()).count();
    volume.replica_sets.iter().map(in_sync).min()
}

/// Lines for `volume show`.
pub(super) fn fields(volume: &Volume) -> Vec<(&'static str, String)> {
    let Some(fewest) = fewest_in_sync(volume) else {
        return Vec::new();
    };
    let head = match volume.head_node_id.as_str() {
        "" => "none yet".to_owned(),
        node if volume.runtime.is_none() => format!("node {node}"),
        node => format!("node {node}, which answers here"),
    };
    let min = volume.min_in_sync as usize;
    let answered = if fewest < min {
        format!(
            "no write is answered: {fewest} in sync where {min} are needed; reads go on where the volume is served"
        )
    } else if volume.write_through {
        format!("is on the disks of all copies in sync: {fewest} now, never fewer than {min}")
    } else {
        format!(
            "is in memory that outlives the daemon, on all copies in sync: {fewest} now, never fewer than {min}; \
             on their disks once a flush was answered"
        )
    };
    let mut fields = vec![
        ("Served by", head),
        ("In sync", format!("{fewest} of {}", volume.replicas)),
        ("Answered write", answered),
    ];
    if !volume.zones.is_empty() {
        fields.push(("Zones", volume.zones.join(", ")));
    }
    let replicas = volume.replica_sets.iter().flat_map(|set| &set.replicas);
    let not_yet = replicas.clone().filter(|r| r.state == "joining").count();
    let leaving = replicas.clone().filter(|r| r.leaving).count();
    if not_yet + leaving > 0 {
        fields.push((
            "Moving",
            format!("{not_yet} copies are being made, {leaving} go when others suffice"),
        ));
    }
    let filling: Vec<Filling> = replicas.filter_map(|replica| replica.filling).collect();
    if !filling.is_empty() {
        let copied: u64 = filling.iter().map(|fill| fill.copied_bytes).sum();
        let left: u64 = filling.iter().map(|fill| fill.left_bytes).sum();
        fields.push((
            "Filling",
            format!(
                "{} copies now: {} copied, at most {} left of those",
                filling.len(),
                human(copied),
                human(left)
            ),
        ));
    }
    fields
}

/// The copies, a row each; empty when there are no replica sets.
pub(super) fn table(volume: &Volume) -> String {
    if volume.replica_sets.is_empty() {
        return String::new();
    }
    // Only the head knows its links.
    let is_head_here = volume.runtime.is_some();
    let sets = volume.replica_sets.iter().enumerate();
    let rows = sets.flat_map(|(index, set)| {
        set.replicas.iter().map(move |replica| {
            vec![
                index.to_string(),
                replica.node_id.clone(),
                replica.store_id.clone(),
                match (&replica.filling, replica.leaving) {
                    (Some(_), _) => format!("{}, filling", replica.state),
                    (None, true) => format!("{}, leaving", replica.state),
                    (None, false) => replica.state.to_owned(),
                },
                match (is_head_here, replica.linked) {
                    (false, _) => "?",
                    (true, true) => "yes",
                    (true, false) => "no",
                }
                .to_owned(),
            ]
        })
    });
    output::columns(&["SET", "NODE", "STORE", "COPY", "LINKED"], &[0], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(states: &[admin::ReplicaState], is_head_here: bool) -> Volume {
        let replica = |(at, state): (usize, &admin::ReplicaState)| admin::Replica {
            node_id: format!("node-{at}"),
            store_id: format!("store-{at}"),
            state: (*state).into(),
            linked: at != 2,
            ..admin::Replica::default()
        };
        Volume::from(admin::Volume {
            replicas: 3,
            min_in_sync: 2,
            head_node_id: "node-0".into(),
            replica_sets: vec![admin::ReplicaSet {
                replicas: states.iter().enumerate().map(replica).collect(),
            }],
            runtime: is_head_here.then(admin::VolumeRuntime::default),
            ..admin::Volume::default()
        })
    }

    #[test]
    fn copies_and_what_an_answer_is_worth_are_told() {
        use admin::ReplicaState::{InSync, Joining, Out};
        let text =
            |volume: &Volume| format!("{}{}", output::fields(&fields(volume)), table(volume));
        let two = text(&volume(&[InSync, InSync, Out], true));
        assert!(two.contains("2 of 3"), "{two}");
        assert!(two.contains("2 now, never fewer than 2"), "{two}");
        assert!(two.contains("node-2  store-2  out      no"), "{two}");
        let one = text(&volume(&[InSync, Joining, Out], false));
        assert!(
            one.contains("no write is answered: 1 in sync where 2"),
            "{one}"
        );
        assert!(one.contains("node-0  store-0  in-sync  ?"), "{one}");
        assert!(one.contains("node node-0\n"), "{one}");
        let mut moving = volume(&[InSync, InSync, Joining], true);
        moving.replica_sets[0].replicas[0].leaving = true;
        moving.replica_sets[0].replicas[2].filling = Some(Filling {
            copied_bytes: 3 << 20,
            left_bytes: 5 << 20,
        });
        let moving = text(&moving);
        assert!(moving.contains("1 copies are being made, 1 go"), "{moving}");
        assert!(
            moving.contains("3 MiB copied, at most 5 MiB left"),
            "{moving}"
        );
        assert!(moving.contains("in-sync, leaving"), "{moving}");
        assert!(moving.contains("joining, filling"), "{moving}");
        let alone = Volume::from(admin::Volume::default());
        assert_eq!(text(&alone), "");
    }
}
