//! `rafs check`.
