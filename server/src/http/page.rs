//! A page of OpenMetrics text, one family of samples after the other.

use std::borrow::Cow;
use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;

use crate::metrics::{BUCKET_BOUNDS_NS, BUCKETS, HistogramSnapshot};

/// Labels of one sample.
pub(super) type Labels<'a> = Vec<(&'static str, Cow<'a, str>)>;

/// A sample without labels.
pub(super) fn one<T>(value: T) -> [(Labels<'static>, T); 1] {
    [(Vec::new(), value)]
}

/// A page of metrics being written.
pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

impl Page<'_> {
    /// Samples of a gauge.
    pub(super) fn gauge<'l, T: prometheus_client::encoding::EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, T)>,
    ) -> fmt::Result {
        self.family(name, help, MetricType::Gauge, samples, |encoder, value| {
            encoder.encode_gauge(&value)
        })
    }

    /// Samples of a counter; `_total` is added to its name.
    pub(super) fn counter<'l, T: prometheus_client::encoding::EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, T)>,
    ) -> fmt::Result {
        self.family(
            name,
            help,
            MetricType::Counter,
            samples,
            |encoder, value| encoder.encode_counter::<[(&str, &str); 0], _, u64>(&value, None),
        )
    }

    /// Samples of a histogram of durations.
    pub(super) fn histogram<'l>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, HistogramSnapshot)>,
    ) -> fmt::Result {
        self.family(
            name,
            help,
            MetricType::Histogram,
            samples,
            |encoder, snapshot| {
                let sum = snapshot.sum_ns as f64 / 1e9;
                let buckets = doublings(&snapshot);
                encoder.encode_histogram::<[(&str, &str); 0]>(sum, snapshot.count(), &buckets, None)
            },
        )
    }

    fn family<'l, T>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Labels<'l>, T)>,
        encode: impl Fn(&mut MetricEncoder<'_>, T) -> fmt::Result,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in samples {
            if labels.is_empty() {
                encode(&mut metric, value)?;
            } else {
                let labels: Vec<(&str, &str)> = labels
                    .iter()
                    .map(|(key, text)| (*key, text.as_ref()))
                    .collect();
                encode(&mut metric.encode_family(&labels)?, value)?;
            }
        }
        Ok(())
    }
}

/// The buckets that end at a doubling of 1 µs, with what falls between two of them; seconds. Half as many lines as are
/// counted, and still one bucket a doubling.
fn doublings(snapshot: &HistogramSnapshot) -> Vec<(f64, u64)> {
    let mut buckets = Vec::with_capacity(BUCKETS / 2 + 1);
    let mut pending = 0;
    for (index, count) in snapshot.buckets.iter().enumerate() {
        pending += count;
        match BUCKET_BOUNDS_NS.get(index) {
            Some(bound) if index % 2 == 0 => {
                buckets.push((*bound as f64 / 1e9, pending));
                pending = 0;
            }
            Some(_) => {}
            // The last bucket is open.
            None => buckets.push((f64::INFINITY, pending)),
        }
    }
    buckets
}
