//! The volumes as NBD exports.

use ashlar_core::nbd::handshake::{Export, ExportName};
use ashlar_core::records::{VolumeRecord, VolumeState};

use super::{Serving, Volumes};
use crate::nbd::{CatalogError, ExportCatalog};

impl ExportCatalog for Volumes {
    async fn lookup(&self, name: &str) -> Result<Option<Export>, CatalogError> {
        if self.is_draining() {
            return Err(CatalogError::ShuttingDown);
        }
        let entry = self.catalog().find(name).cloned();
        let Some(entry) = entry.filter(|entry| entry.current.record.state == VolumeState::Active)
        else {
            return Ok(None);
        };
        let record = &entry.current.record;
        match entry.serving {
            Serving::Yes => Ok(Some(Export {
                volume: record.id,
                name: record.name.to_string(),
                description: description(record),
                size_bytes: record.size_bytes,
                read_only: record.read_only,
            })),
            Serving::No(reason) => Err(CatalogError::Unavailable(format!(
                "volume {} is not served: {reason}",
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
            .filter(|r| r.state == VolumeState::Active);
        Ok(active
            .map(|r| ExportName {
                name: r.name.to_string(),
                description: description(r),
            })
            .collect())
    }
}

fn description(record: &VolumeRecord) -> String {
    let mut text = format!("Ashlar volume {}", record.id.0);
    if record.read_only {
        text.push_str(", read-only");
    }
    if record.write_through {
        text.push_str(", write-through");
    }
    text
}
