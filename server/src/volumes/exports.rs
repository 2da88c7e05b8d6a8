//! The volumes as NBD exports.

use ashlar_core::nbd::handshake::{Export, ExportName};
use ashlar_core::records::{FilesystemState, VolumeRecord, VolumeState, parse_export_name};

use super::{Serving, Volumes};
use crate::nbd::{CatalogError, ExportCatalog};

impl ExportCatalog for Volumes {
    async fn lookup(&self, name: &str) -> Result<Option<Export>, CatalogError> {
        if self.is_draining() {
            return Err(CatalogError::ShuttingDown);
        }
        let published = parse_export_name(name);
        let entry = match published {
            Some((id, _)) => self.catalog().get(id).cloned(),
            None => self.catalog().find(name).cloned(),
        };
        let Some(entry) = entry.filter(|entry| entry.current.record.state == VolumeState::Active)
        else {
            return Ok(None);
        };
        let record = &entry.current.record;
        let token = published.map(|(_, token)| token);
        let publication = token.and_then(|token| record.publication_with(token));
        if token.is_some() && publication.is_none() {
            return Err(CatalogError::Forbidden(format!(
                "volume {} is not published under this name; it was unpublished, or the name is wrong",
                record.name
            )));
        }
        if token.is_none()
            && let Some(holder) = record.publications.first()
        {
            return Err(CatalogError::Forbidden(format!(
                "volume {} is published to node {} and opened by nobody else; to use it by hand, run `ashlar volume unpublish {}` first",
                record.name, holder.node, record.name
            )));
        }
        match entry.serving {
            Serving::Yes => Ok(Some(Export {
                volume: record.id,
                // A published volume has no name that it could be opened by but the one asked for.
                name: match token {
                    Some(_) => name.to_owned(),
                    None => record.name.to_string(),
                },
                description: description(record),
                size_bytes: record.size_bytes,
                read_only: record.read_only
                    || publication.is_some_and(|p| p.read_only)
                    || (token.is_none() && is_being_formatted(record)),
                token,
            })),
            unserved => Err(CatalogError::Unavailable(format!(
                "volume {} is not served: {unserved}",
                record.name
            ))),
        }
    }

    async fn list(&self) -> Result<Vec<ExportName>, CatalogError> {
        if self.is_draining() {
            return Err(CatalogError::ShuttingDown);
        }
        let all = self.catalog().all();
        let active = all
            .iter()
            .map(|entry| &entry.current.record)
            .filter(|r| r.state == VolumeState::Active)
            // Clients go through a list and open each; a published volume is not there for them.
            .filter(|r| r.publications.is_empty());
        Ok(active
            .map(|r| ExportName {
                name: r.name.to_string(),
                description: description(r),
            })
            .collect())
    }
}

/// A filesystem was begun on it. Whoever stages the volume next throws away what is there without one and makes it again, so
/// nobody else may put anything there; what is there may be read.
fn is_being_formatted(record: &VolumeRecord) -> bool {
    record
        .filesystem
        .as_ref()
        .is_some_and(|filesystem| filesystem.state == FilesystemState::Formatting)
}

fn description(record: &VolumeRecord) -> String {
    let mut text = format!("Ashlar volume {}", record.id.0);
    if record.read_only {
        text.push_str(", read-only");
    }
    if record.write_through {
        text.push_str(", write-through");
    }
    if is_being_formatted(record) {
        text.push_str(", read-only by this name: its filesystem was begun and is not finished");
    }
    if !record.publications.is_empty() {
        text.push_str(", published");
    }
    text
}
