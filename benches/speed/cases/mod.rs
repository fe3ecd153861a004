//! The cases, one file each. Each adds its rows to the results.

pub(crate) mod background;
pub(crate) mod cut;
pub(crate) mod first_writes;
pub(crate) mod layouts;
pub(crate) mod many;
pub(crate) mod plain;
pub(crate) mod restart;
pub(crate) mod scale;

use crate::Result;
use crate::results::Results;
use crate::stage::Stage;

type Run = fn(&mut Stage<'_>, &mut Results) -> Result<()>;

/// All cases in their order.
pub(crate) const ALL: [(u32, &str, Run); 8] = [
    (plain::CASE, "plain", plain::run),
    (first_writes::CASE, "first writes", first_writes::run),
    (cut::CASE, "the cut", cut::run),
    (background::CASE, "beside background work", background::run),
    (many::CASE, "many snapshots", many::run),
    (scale::CASE, "scale", scale::run),
    (restart::CASE, "restart", restart::run),
    (layouts::CASE, "layouts", layouts::run),
];
