use anyhow::Result;
use serde::Serialize;
use tensora::Plan;

use crate::args::PlanArgs;
use crate::output::{Console, Report, emit};

/// How a checkpoint would be loaded; its JSON is the plan's own.
#[derive(Serialize)]
#[serde(transparent)]
struct PlanReport(Plan);

impl Report for PlanReport {
    fn text(&self) -> String {
        self.0.to_string()
    }
}

pub(crate) fn plan(arguments: &PlanArgs, console: &Console) -> Result<()> {
    let loader = arguments.parts.loader(&arguments.source)?;
    let loader = arguments.policy.apply(loader);
    emit(&PlanReport(loader.plan(&arguments.source.path)?), console)
}
