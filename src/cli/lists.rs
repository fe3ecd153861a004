//! Lists: what of them is asked for, and how a page says that it is not all.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::CliError;
use super::client::{Client, query_of};
use super::output::Output;
use crate::control::api::ListQuery;

/// Shows what of a list is wanted.
pub(super) fn show<Q>(
    path: &str,
    query: &Q,
    client: &Client,
    output: &Output,
    table: impl FnOnce(&[Q::Item]) -> String,
) -> Result<(), CliError>
where
    Q: ListQuery + Serialize,
    Q::Item: Serialize + DeserializeOwned,
{
    let answer = client.get_page(&format!("{path}?{}", query_of(query)))?;
    let items: Vec<Q::Item> = answer.json()?;
    let more =
        items.last().filter(|_| answer.has_next).map(|last| format!("there are more: --after {}\n", Q::key_of(last)));
    output.show(&items, |items| table(items) + &more.unwrap_or_default())
}
