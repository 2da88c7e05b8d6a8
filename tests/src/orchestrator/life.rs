//! One volume: claimed, attached to node after node for pod after pod, grown, and removed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pod::Data;
use super::{GaveUp, World};
use crate::csi::{csi, loops_below, mounts_below, strings, text};
use crate::seed::Rng;

const GROWTH: i64 = 4 << 20;

/// How a volume is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Block,
}

impl Kind {
    /// The size it begins with.
    fn size(self) -> i64 {
        match self {
            Kind::Xfs => 304 << 20,
            Kind::Ext4 | Kind::Block => 32 << 20,
        }
    }
}

/// What a kubelet believes of a volume on its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    stage: Stage,
    /// The target that is, or may be, published.
    pod: Option<u64>,
    /// It is for certain.
    runs: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    No,
    /// Nobody knows: asked for again by the next pod, undone when the volume goes.
    Uncertain,
    Yes,
}

/// One volume and everything that records of an orchestrator say of it.
pub struct Life {
    world: Arc<World>,
    name: String,
    rng: Rng,
    data: Data,
    size: i64,
    id: String,
    volume_context: HashMap<String, String>,
    held: Vec<Held>,
    /// The node of its VolumeAttachment, and what it was attached with.
    attached: Option<(usize, HashMap<String, String>)>,
    pods: u64,
}

impl Life {
    /// A claim that is not provisioned yet. `number` tells volumes apart.
    pub fn new(world: &Arc<World>, number: u64, kind: Kind, rng: Rng) -> Life {
        let data = match kind {
            Kind::Ext4 => Data::mounted("ext4", number),
            Kind::Xfs => Data::mounted("xfs", number),
            Kind::Block => Data::raw(number),
        };
        Life {
            world: Arc::clone(world),
            name: format!("pvc-{number}"),
            rng,
            data,
            size: kind.size(),
            id: String::new(),
            volume_context: HashMap::new(),
            held: vec![Held::default(); world.nodes.len()],
            attached: None,
            pods: 0,
        }
    }

    /// From the claim to its removal, over as many pods as there is time for.
    pub fn live(mut self) {
        self.provision();
        while !self.world.is_stopping() {
            let node = self.rng.below(self.held.len() as u64) as usize;
            // A volume is detached when no node uses it any more.
            for other in (0..self.held.len()).filter(|other| *other != node) {
                self.leave(other);
            }
            self.attach(node);
            if self.bring_up(node) {
                self.run(node);
            }
            match self.rng.below(100) {
                // The next pod runs on the same node, if it is the same node that is drawn next.
                0..40 => self.end_pod(node),
                40..75 => self.leave(node),
                75..90 => self.lose(node),
                _ => {
                    self.leave(node);
                    self.grow();
                }
            }
        }
        for node in 0..self.held.len() {
            self.leave(node);
        }
        let (world, id) = (Arc::clone(&self.world), self.id.clone());
        let rng = &mut self.rng;
        world.insist(rng, "delete", &world.nodes[0], |calls| calls.delete(&id));
    }

    /// external-provisioner: the same name until it is there.
    fn provision(&mut self) {
        let request = csi::CreateVolumeRequest {
            name: self.name.clone(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: self.size,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![self.data.capability()],
            parameters: strings(self.data.class().1),
            ..Default::default()
        };
        let world = Arc::clone(&self.world);
        let volume = world.insist(&mut self.rng, "create", &world.nodes[0], |calls| {
            calls.create(request.clone())
        });
        self.id = volume.volume_id;
        self.volume_context = volume.volume_context;
    }

    /// external-attacher: one VolumeAttachment at a time, the old one gone before the new one is there.
    fn attach(&mut self, node: usize) {
        if self.attached.as_ref().is_some_and(|(at, _)| *at == node) {
            return;
        }
        self.detach();
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: self.world.nodes[node].node_id().to_owned(),
            volume_capability: Some(self.data.capability()),
            volume_context: self.volume_context.clone(),
            ..Default::default()
        };
        let world = Arc::clone(&self.world);
        let context = world.insist(&mut self.rng, "attach", &world.nodes[0], |calls| {
            calls.controller_publish(request.clone())
        });
        // It looks again from time to time, and gets the same answer.
        if self.rng.chance(20) {
            let again = world.insist(&mut self.rng, "attach", &world.nodes[0], |calls| {
                calls.controller_publish(request.clone())
            });
            assert_eq!(again, context, "another answer to the same question");
        }
        self.attached = Some((node, context));
    }

    fn detach(&mut self) {
        let Some((node, _)) = self.attached.take() else {
            return;
        };
        let world = Arc::clone(&self.world);
        let (id, name) = (self.id.clone(), world.nodes[node].node_id().to_owned());
        for _ in 0..1 + u64::from(self.rng.chance(20)) {
            let rng = &mut self.rng;
            world.insist(rng, "detach", &world.nodes[0], |calls| {
                calls.controller_unpublish(&id, &name)
            });
        }
    }

    fn staging(&self, node: usize) -> PathBuf {
        let root = self.world.nodes[node].root();
        root.join("plugins").join(&self.name).join("globalmount")
    }

    fn target(&self, node: usize, pod: u64) -> PathBuf {
        let root = self.world.nodes[node].root();
        let pod = format!("{}-{pod}", self.name);
        root.join("pods").join(pod).join("mount")
    }

    /// The kubelet: stages and publishes for a new pod. False: the pod was deleted before it ran.
    fn bring_up(&mut self, node: usize) -> bool {
        self.end_pod(node);
        let world = Arc::clone(&self.world);
        let kubelet = &world.nodes[node];
        let context = match &self.attached {
            Some((at, context)) if *at == node => context.clone(),
            _ => unreachable!("it was attached"),
        };
        let staging = self.staging(node);
        if self.held[node].stage != Stage::Yes {
            fs::create_dir_all(&staging).expect("a staging directory");
            let request = csi::NodeStageVolumeRequest {
                volume_id: self.id.clone(),
                publish_context: context.clone(),
                staging_target_path: text(&staging),
                volume_capability: Some(self.data.capability()),
                volume_context: self.volume_context.clone(),
                ..Default::default()
            };
            let staged = world.ask(&mut self.rng, "stage", kubelet, 10, |calls| {
                calls.stage(request.clone())
            });
            match staged {
                Ok(_) => self.held[node].stage = Stage::Yes,
                Err(gave_up) => {
                    self.held[node].stage = match gave_up {
                        GaveUp::Uncertain => Stage::Uncertain,
                        GaveUp::Final => {
                            self.nothing_is_left(node);
                            remove_staging(&staging);
                            Stage::No
                        }
                    };
                    return false;
                }
            }
        }
        let pod = self.pods;
        self.pods += 1;
        let target = self.target(node, pod);
        fs::create_dir_all(target.parent().expect("a parent")).expect("a pod's directory");
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: context,
            staging_target_path: text(&staging),
            target_path: text(&target),
            volume_capability: Some(self.data.capability()),
            volume_context: self.volume_context.clone(),
            ..Default::default()
        };
        let published = world.ask(&mut self.rng, "publish", kubelet, 10, |calls| {
            calls.publish(request.clone())
        });
        match published {
            Ok(_) => {
                self.held[node].pod = Some(pod);
                self.held[node].runs = true;
                true
            }
            Err(GaveUp::Uncertain) => {
                self.held[node].pod = Some(pod);
                false
            }
            Err(GaveUp::Final) => {
                remove_pod(&target);
                false
            }
        }
    }

    /// After a final answer nobody comes to undo anything.
    fn nothing_is_left(&self, node: usize) {
        let root = self.world.nodes[node].root();
        let devices = loops_below(&root.with_file_name("s").join("fuse").join(&self.id));
        let mounts = mounts_below(&self.staging(node));
        assert!(
            devices.is_empty() && mounts.is_empty(),
            "{}: {devices:?} and {mounts:?} were left after a final answer",
            self.name
        );
    }

    /// The pod finds what there was and adds to it, until it is done or its device fails.
    fn run(&mut self, node: usize) {
        let pod = self.held[node].pod.expect("a pod");
        let target = self.target(node, pod);
        let what = match self.data.check(&target) {
            Ok(()) => "pods",
            Err(_) => "pods that could not read",
        };
        self.world.count(what, "ran".to_owned());
        let count = self.rng.within(1..8);
        if what == "pods" && self.data.add(&target, count, &mut self.rng).is_err() {
            self.world
                .count("pods that could not write", "ran".to_owned());
        }
    }

    /// The kubelet: a pod goes, the volume may stay staged for the next one.
    fn end_pod(&mut self, node: usize) {
        let Some(pod) = self.held[node].pod else {
            return;
        };
        let world = Arc::clone(&self.world);
        let (id, target) = (self.id.clone(), self.target(node, pod));
        for _ in 0..1 + u64::from(self.rng.chance(20)) {
            let rng = &mut self.rng;
            world.insist(rng, "unpublish", &world.nodes[node], |calls| {
                calls.unpublish(&id, &target)
            });
        }
        remove_pod(&target);
        self.held[node].pod = None;
        self.held[node].runs = false;
    }

    /// The last pod goes, and the volume with it.
    fn leave(&mut self, node: usize) {
        self.end_pod(node);
        if self.held[node].stage != Stage::No {
            let world = Arc::clone(&self.world);
            let (id, staging) = (self.id.clone(), self.staging(node));
            for _ in 0..1 + u64::from(self.rng.chance(20)) {
                let rng = &mut self.rng;
                world.insist(rng, "unstage", &world.nodes[node], |calls| {
                    calls.unstage(&id, &staging)
                });
            }
            remove_staging(&staging);
            self.held[node].stage = Stage::No;
        }
        if self.attached.as_ref().is_some_and(|(at, _)| *at == node) {
            self.detach();
        }
    }

    /// The node is given up: the volume is taken from it while its pod writes, used elsewhere, and the node comes back and
    /// clears away what it has.
    fn lose(&mut self, node: usize) {
        self.world.count("nodes lost", "ran".to_owned());
        self.detach();
        if let Some(pod) = self.held[node].pod
            && self.held[node].runs
        {
            let target = self.target(node, pod);
            let late = late(&self.data, &target, &mut self.rng);
            assert!(!late, "{}: a fenced node wrote", self.name);
        }
        let other = (node + 1) % self.held.len();
        self.leave(other);
        // Both nodes are one machine, and its kernel mounts no xfs twice.
        if self.data.is_xfs() {
            self.leave(node);
        }
        self.attach(other);
        if self.bring_up(other) {
            self.run(other);
        }
        self.end_pod(node);
        self.leave_fenced(node);
    }

    /// As [`Life::leave`], where the volume is attached elsewhere by now.
    fn leave_fenced(&mut self, node: usize) {
        let attached = self.attached.take();
        self.leave(node);
        self.attached = attached;
    }

    /// external-resizer, with a kubelet that finds nothing to do for a volume nobody uses.
    fn grow(&mut self) {
        self.size += GROWTH;
        let world = Arc::clone(&self.world);
        let (id, size) = (self.id.clone(), self.size);
        let rng = &mut self.rng;
        let grown = world.insist(rng, "expand", &world.nodes[0], |calls| {
            calls.expand(&id, size)
        });
        assert_eq!(grown.capacity_bytes, size);
    }
}

/// Whether a write of a pod whose node was fenced is answered and durable.
fn late(data: &Data, target: &Path, rng: &mut Rng) -> bool {
    match data {
        Data::Mounted(..) => {
            let late = fs::File::create(target.join("late"));
            late.and_then(|mut file| {
                std::io::Write::write_all(&mut file, &[1; 4096])?;
                file.sync_all()
            })
            .is_ok()
        }
        Data::Raw(_) => crate::workload::direct(target)
            .and_then(|device| crate::workload::Blocks::new(0, 0, 1).write(&device, rng))
            .is_ok(),
    }
}

/// As the kubelet: plain directories, which fail to go when something is in them or mounted on them.
fn remove_pod(target: &Path) {
    let pod = target.parent().expect("a parent");
    if let Err(error) = fs::remove_dir(pod) {
        panic!("{} cannot be removed: {error}", pod.display());
    }
}

fn remove_staging(staging: &Path) {
    for directory in [staging, staging.parent().expect("a parent")] {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                panic!("{} cannot be removed: {error}", directory.display());
            }
            _ => {}
        }
    }
}
