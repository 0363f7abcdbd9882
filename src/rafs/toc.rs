//! Sections of a packed blob.
