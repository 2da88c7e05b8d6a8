//! Many calls at once.

use ashlar_tests::csi::csi;
use ashlar_tests::csi::csi::controller_client::ControllerClient;
use ashlar_tests::csi::csi::volume_capability::access_mode::Mode;
use ashlar_tests::csi::{Driver, mounted};
use ashlar_tests::daemon::Setup;
use tonic::Code;

const VOLUMES: usize = 100;
const CALLS: usize = 1000;
/// What the driver may use of memory.
const RESIDENT_BYTES_MAX: u64 = 100 << 20;

/// What an orchestrator's sidecars may be doing at once to one volume, all of it idempotent.
#[derive(Clone, Copy, Debug)]
enum Call {
    Create,
    Publish,
    Expand,
    Unpublish,
    List,
}

const KINDS: [Call; 5] = [
    Call::Create,
    Call::Publish,
    Call::Expand,
    Call::Unpublish,
    Call::List,
];

#[test]
fn a_thousand_calls_on_a_hundred_volumes() {
    let driver = Driver::start("csi-crowd", Setup::default());
    let channel = driver.channel();
    let node = driver.node_id().to_owned();
    let outcomes = driver.together(async {
        let mut ids = Vec::new();
        for n in 0..VOLUMES {
            let created = create(&channel, n).await.expect("created");
            ids.push(created.volume.expect("a volume").volume_id);
        }
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..CALLS {
            // Each volume gets each kind of call, several times, next to one another.
            let volume = n / KINDS.len() % VOLUMES;
            let (channel, id, node) = (channel.clone(), ids[volume].clone(), node.clone());
            let kind = KINDS[n % KINDS.len()];
            calls.spawn(async move { (kind, call(kind, &channel, volume, &id, &node).await) });
        }
        calls.join_all().await
    });
    assert_eq!(outcomes.len(), CALLS);
    let mut done = 0;
    for (kind, outcome) in outcomes {
        match outcome {
            Ok(()) => done += 1,
            // Another call on the same volume is under way.
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{kind:?}: {status:?}"),
        }
    }
    println!("{done} of {CALLS} done, the others told to come back");
    assert!(done >= CALLS / 4, "only {done} were done");
    let resident = driver.usage().resident_bytes;
    assert!(resident < RESIDENT_BYTES_MAX, "{resident} bytes");
    // The orchestrator comes back until each is done, and then the state is the right one.
    let ids = driver.together(async {
        let mut ids = Vec::new();
        for n in 0..VOLUMES {
            ids.push(
                create(&channel, n)
                    .await
                    .expect("found")
                    .volume
                    .expect("one")
                    .volume_id,
            );
        }
        for (n, id) in ids.iter().enumerate() {
            for kind in [Call::Expand, Call::Publish] {
                call(kind, &channel, n, id, &node).await.expect("alone");
            }
        }
        ids
    });
    let listed = driver.together(list(&channel)).expect("listed");
    assert_eq!(listed.len(), VOLUMES);
    for (volume, nodes) in &listed {
        assert!(ids.contains(&volume.volume_id));
        assert_eq!(volume.capacity_bytes, 16 << 20, "{volume:?}");
        assert_eq!(nodes, std::slice::from_ref(&node), "{volume:?}");
    }
}

async fn create(
    channel: &tonic::transport::Channel,
    n: usize,
) -> Result<csi::CreateVolumeResponse, tonic::Status> {
    let request = csi::CreateVolumeRequest {
        name: format!("crowd-{n}"),
        capacity_range: Some(csi::CapacityRange {
            required_bytes: 8 << 20,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![mounted("ext4", Mode::SingleNodeWriter)],
        ..Default::default()
    };
    let answer = ControllerClient::new(channel.clone())
        .create_volume(request)
        .await;
    answer.map(tonic::Response::into_inner)
}

async fn list(
    channel: &tonic::transport::Channel,
) -> Result<Vec<(csi::Volume, Vec<String>)>, tonic::Status> {
    let mut all = Vec::new();
    let mut starting_token = String::new();
    loop {
        let request = csi::ListVolumesRequest {
            max_entries: 7,
            starting_token,
        };
        let page = ControllerClient::new(channel.clone())
            .list_volumes(request)
            .await?
            .into_inner();
        all.extend(page.entries.into_iter().map(|entry| {
            let nodes = entry.status.expect("a status").published_node_ids;
            (entry.volume.expect("a volume"), nodes)
        }));
        starting_token = page.next_token;
        if starting_token.is_empty() {
            return Ok(all);
        }
    }
}

async fn call(
    kind: Call,
    channel: &tonic::transport::Channel,
    n: usize,
    id: &str,
    node: &str,
) -> Result<(), tonic::Status> {
    let mut client = ControllerClient::new(channel.clone());
    match kind {
        Call::Create => create(channel, n).await.map(|answer| {
            assert_eq!(answer.volume.expect("a volume").volume_id, id);
        }),
        Call::Publish => {
            let request = csi::ControllerPublishVolumeRequest {
                volume_id: id.to_owned(),
                node_id: node.to_owned(),
                volume_capability: Some(mounted("ext4", Mode::SingleNodeWriter)),
                ..Default::default()
            };
            client
                .controller_publish_volume(request)
                .await
                .map(|answer| {
                    assert!(answer.into_inner().publish_context["export"].starts_with(id));
                })
        }
        Call::Expand => {
            let request = csi::ControllerExpandVolumeRequest {
                volume_id: id.to_owned(),
                capacity_range: Some(csi::CapacityRange {
                    required_bytes: 16 << 20,
                    limit_bytes: 0,
                }),
                ..Default::default()
            };
            client
                .controller_expand_volume(request)
                .await
                .map(|answer| {
                    assert_eq!(answer.into_inner().capacity_bytes, 16 << 20);
                })
        }
        Call::Unpublish => {
            let request = csi::ControllerUnpublishVolumeRequest {
                volume_id: id.to_owned(),
                node_id: node.to_owned(),
                ..Default::default()
            };
            client.controller_unpublish_volume(request).await.map(drop)
        }
        Call::List => list(channel).await.map(|all| {
            assert_eq!(all.len(), VOLUMES);
        }),
    }
}
