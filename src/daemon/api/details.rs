//! What people ask when something is wrong: the last errors, and an image's super block.

use axum::body::Bytes;
use axum::http::StatusCode;
use serde_json::json;

use super::query::Query;
use super::{Answer, failed, json as answer, no_body};
use crate::daemon::log::Events;
use crate::daemon::state::Status;
use crate::fuse::{MountError, MountPath};
use crate::rafs::{Bootstrap, FormatError};

pub(super) fn events(status: &Status, body: &Bytes) -> Answer {
    no_body(body)?;
    let messages = status.events().messages();
    Ok(answer(
        StatusCode::OK,
        &json!({
            "max_errors": Events::MAX_ERRORS,
            "total_errors": messages.len(),
            "max_size": Events::MAX_SIZE,
            "total_size": messages.iter().map(String::len).sum::<usize>(),
            "errors": messages,
        }),
    ))
}

/// The super block of a mounted image.
pub(super) fn backend(status: &Status, query: &Query<'_>, body: &Bytes) -> Answer {
    no_body(body)?;
    let at = MountPath::parse(&query.required("mountpoint")?)
        .map_err(|e| failed(format!("mountpoint: {e}")))?;
    let mut entries = status.mounted().entries().into_iter();
    let image = entries.find(|(path, _)| *path == at).and_then(|(_, entry)| entry.image);
    let image = image.ok_or_else(|| failed(MountError::Missing { at }.to_string()))?;
    let meta = super_meta(&image.bootstrap).map_err(|e| failed(e.to_string()))?;
    Ok(answer(StatusCode::OK, &meta))
}

/// The members of nydusd's `RafsSuperMeta`.
fn super_meta(image: &Bootstrap) -> Result<serde_json::Value, FormatError> {
    let (sb, ext) = image.super_blocks()?;
    // As a guest is told: as long as every kernel can count.
    let timeout = json!({"secs": u32::MAX, "nanos": 0});
    Ok(json!({
        "magic": sb.magic.get(),
        // RAFS version 6.
        "version": 0x600,
        "sb_size": size_of_val(&sb) + size_of_val(&ext),
        "root_inode": image.root().0,
        "chunk_size": image.chunk_size(),
        "batch_size": 0,
        "inodes_count": image.path_count(),
        "flags": {"bits": ext.flags.get()},
        "inode_table_entries": 0,
        "inode_table_offset": 0,
        "blob_table_size": ext.blob_table_size.get(),
        "blob_table_offset": ext.blob_table_offset.get(),
        "extended_blob_table_offset": 0,
        "extended_blob_table_entries": 0,
        "blob_device_table_count": sb.extra_devices.get(),
        "blob_device_table_offset": u64::from(sb.device_slot_offset.get()) * 128,
        "prefetch_table_offset": ext.prefetch_table_offset.get(),
        "prefetch_table_entries": ext.prefetch_table_size.get() / 4,
        "attr_timeout": timeout,
        "entry_timeout": timeout,
        "is_chunk_dict": false,
        "meta_blkaddr": sb.meta_block.get(),
        "root_nid": sb.root_nid.get(),
        "chunk_table_offset": ext.chunk_table_offset.get(),
        "chunk_table_size": ext.chunk_table_size.get(),
    }))
}
