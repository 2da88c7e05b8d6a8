//! Creating a volume: the same name gets the same volume, however often it is asked for.

use std::collections::{BTreeMap, BTreeSet};

use super::parameters::{self, Parameters};
use super::sizing::{self, Range};
use super::{Controller, naming, unsupported};
use crate::capability::{Access, Capability};
use crate::daemon::{Limits, NewVolume, Volume};
use crate::refusal::{Class, Refusal};

/// The annotation of a volume that this driver made: what its orchestrator called it.
pub const NAME_KEY: &str = "csi.ashlar.io/name";
/// Its parameters, one key each.
const PARAMETER_PREFIX: &str = "csi.ashlar.io/parameter/";
/// There when it shall be used on several nodes at once. One that turns out to have copies was never answered then.
const MULTI_NODE_KEY: &str = "csi.ashlar.io/multi-node";
/// For people: whose claim it is.
const CLAIM_PREFIX: &str = "csi.ashlar.io/claim/";

/// Topology segments, key to value.
pub type Place = BTreeMap<String, String>;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The key: one name, one volume.
    pub name: String,
    /// How large.
    pub range: Range,
    /// How it will be used.
    pub capabilities: Vec<Capability>,
    /// Of the class.
    pub parameters: Parameters,
    /// The class as it was given, to compare with on a repeat.
    pub given: BTreeMap<String, String>,
    /// Where it must be reachable from: any of these. Empty is anywhere.
    pub requisite: Vec<Place>,
    /// The same, those that are better first.
    pub preferred: Vec<Place>,
}

/// What was made, or found.
#[derive(Clone, Debug)]
pub struct Created {
    /// The volume.
    pub volume: Volume,
    /// What the node needs to know of it.
    pub context: BTreeMap<String, String>,
    /// Where it can be used.
    pub places: Vec<Place>,
}

impl Controller {
    /// Creates a volume, or finds the one that was created by an earlier attempt. [`Class::AlreadyExists`] when the name
    /// has a volume that is not as asked for.
    pub async fn create(&self, request: CreateRequest) -> Result<Created, Refusal> {
        let places = self.places().await?;
        let volume = self.make_or_find(request, &places).await?;
        Ok(Created {
            context: context_of(&volume),
            volume,
            places,
        })
    }

    async fn make_or_find(
        &self,
        request: CreateRequest,
        places: &[Place],
    ) -> Result<Volume, Refusal> {
        let name = naming::volume_name(&request.name);
        if let Some(volume) = self.daemon().volume_named(&name).await? {
            return self.found(volume, &request).await;
        }
        is_reachable(&request, places)?;
        let space = self.space(&request.parameters).await?;
        let minimum = smallest(&request);
        let size_bytes = sizing::chosen(request.range, minimum, space.volume_max_bytes)?;
        if size_bytes > space.provisionable_bytes {
            let zones = &request.parameters.zones;
            let among = match zones.is_empty() {
                true => String::new(),
                false => format!(" on nodes of zone {}", zones.join(" or ")),
            };
            return Err(Refusal::new(
                Class::ResourceExhausted,
                format!(
                    "{size_bytes} bytes were asked for and {} can be provisioned{among}",
                    space.provisionable_bytes
                ),
            ));
        }
        let new = NewVolume {
            name: name.clone(),
            size_bytes,
            write_through: request.parameters.write_through,
            limits: Limits {
                iops: request.parameters.mutable.iops.unwrap_or(0),
                bytes_per_second: request.parameters.mutable.bytes_per_second.unwrap_or(0),
            },
            annotations: annotations(&request),
            replicas: request.parameters.replicas.unwrap_or(0),
            min_in_sync: request.parameters.min_in_sync.unwrap_or(0),
            zones: request.parameters.zones.clone(),
        };
        match self.daemon().create(new).await {
            Ok(volume) => self.found(volume, &request).await,
            // Somebody was faster: another replica of the controller, or the caller's own attempt before.
            Err(refusal) if refusal.class == Class::AlreadyExists => {
                match self.daemon().volume_named(&name).await? {
                    Some(volume) => self.found(volume, &request).await,
                    None => Err(Refusal::busy(&format!("volume {}", request.name))),
                }
            }
            Err(refusal)
                if refusal.class == Class::FailedPrecondition
                    && request.parameters.replicas.is_some_and(|copies| copies > 1) =>
            {
                match self.daemon().volume_named(&name).await? {
                    // Recorded, and not served yet: whoever uses it has it opened.
                    Some(volume) => self.found(volume, &request).await,
                    // How many copies there can be is for the daemon to know; the class is what has to change.
                    None => Err(Refusal::invalid(format!(
                        "{}: {refusal}",
                        parameters::REPLICAS
                    ))),
                }
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// A volume of the wanted name, just made or found. Whether it has copies is known only now: one with copies that was
    /// made to be used on several nodes cannot be. It goes again, however often that was begun, and is answered to nobody,
    /// not even to a caller whom it would suit: otherwise it could go while it is used.
    async fn found(&self, volume: Volume, request: &CreateRequest) -> Result<Volume, Refusal> {
        let is_mistaken = volume.is_replicated
            && volume.annotations.contains_key(MULTI_NODE_KEY)
            && volume.annotations.get(NAME_KEY) == Some(&request.name)
            && !volume.is_deleting;
        if is_mistaken {
            self.delete(volume.id).await?;
            return Err(match mismatch(&volume, request) {
                Some(mismatch) => Refusal::invalid(mismatch),
                None => Refusal::busy(&format!("volume {}", request.name)),
            });
        }
        same(volume, request)
    }

    /// The places of the nodes that are known, each once. Every one of them reaches every volume of the daemon's; a node
    /// without this driver reaches none.
    pub async fn places(&self) -> Result<Vec<Place>, Refusal> {
        let nodes = self.daemon().nodes().await?;
        let places: BTreeSet<Place> = nodes.into_iter().map(|node| node.topology).collect();
        Ok(places
            .into_iter()
            .filter(|place| !place.is_empty())
            .collect())
    }
}

/// Whether one of `places` has all the segments of `wanted`.
pub fn is_within(places: &[Place], wanted: &Place) -> bool {
    let has = |place: &Place| {
        let mut segments = wanted.iter();
        segments.all(|(key, value)| place.get(key) == Some(value))
    };
    places.iter().any(has)
}

/// Whether some node is where the volume must be reachable from.
fn is_reachable(request: &CreateRequest, places: &[Place]) -> Result<(), Refusal> {
    if request.requisite.is_empty() && request.preferred.is_empty() {
        return Ok(());
    }
    let mut wanted = request.requisite.iter().chain(&request.preferred);
    if wanted.any(|wanted| is_within(places, wanted)) {
        return Ok(());
    }
    Err(Refusal::new(
        Class::ResourceExhausted,
        "no node of this driver is in any of the places asked for",
    ))
}

/// The smallest volume that all its filesystems fit on.
fn smallest(request: &CreateRequest) -> u64 {
    let default = request.parameters.filesystem;
    let of = |capability: &Capability| match &capability.access {
        Access::Mount { filesystem, .. } => filesystem
            .or(default)
            .unwrap_or(crate::capability::Filesystem::Ext4)
            .minimum_bytes(),
        Access::Block => 0,
    };
    request.capabilities.iter().map(of).max().unwrap_or(0)
}

fn annotations(request: &CreateRequest) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([(NAME_KEY.to_owned(), request.name.clone())]);
    if request
        .capabilities
        .iter()
        .any(|each| each.mode.is_multi_node())
    {
        annotations.insert(MULTI_NODE_KEY.to_owned(), "true".to_owned());
    }
    for (key, value) in &request.given {
        let prefix = if request.parameters.metadata.contains_key(key) {
            CLAIM_PREFIX
        } else {
            PARAMETER_PREFIX
        };
        annotations.insert(format!("{prefix}{key}"), value.clone());
    }
    annotations
}

/// A volume of the wanted name: is it the one?
fn same(volume: Volume, request: &CreateRequest) -> Result<Volume, Refusal> {
    if volume.is_deleting {
        return Err(Refusal::busy(&format!("volume {}", request.name)));
    }
    let differs = |what: &str| {
        Err(Refusal::exists(format!(
            "volume {} exists with {what}",
            request.name
        )))
    };
    match volume.annotations.get(NAME_KEY) {
        Some(name) if *name == request.name => {}
        _ => return differs("another origin: this driver did not create it"),
    }
    if !request.range.allows(volume.size_bytes) {
        return differs(&format!("{} bytes", volume.size_bytes));
    }
    let wanted = annotations(request);
    let of_class = |annotations: &BTreeMap<String, String>| -> BTreeMap<String, String> {
        annotations
            .iter()
            .filter(|(key, _)| key.starts_with(PARAMETER_PREFIX))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    if of_class(&volume.annotations) != of_class(&wanted) {
        return differs("other parameters");
    }
    if let Some(mismatch) = mismatch(&volume, request) {
        return differs(&mismatch);
    }
    Ok(volume)
}

/// Why a volume cannot be used in all the ways asked for.
fn mismatch(volume: &Volume, request: &CreateRequest) -> Option<String> {
    let mut capabilities = request.capabilities.iter();
    capabilities.find_map(|capability| unsupported(volume, capability))
}

/// What the node needs to know of a volume beside what is published to it.
pub fn context_of(volume: &Volume) -> BTreeMap<String, String> {
    [parameters::FILESYSTEM, parameters::MKFS_OPTIONS]
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), parameter(volume, key)?.to_owned())))
        .collect()
}

/// A parameter that a volume was made with, as its class gave it.
pub fn parameter<'a>(volume: &'a Volume, key: &str) -> Option<&'a str> {
    let value = volume.annotations.get(&format!("{PARAMETER_PREFIX}{key}"));
    value.map(String::as_str)
}
