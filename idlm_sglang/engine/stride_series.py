"""The strides that decode steps used, as plain counts and as ``idlm:*`` Prometheus series."""


class StrideSeries:
    """Counts decode steps by stride, and publishes what the controller expects and gets.

    Args:
        labels: Prometheus labels (``model_name``, ``dp_rank``), or None to count without publishing.
    """

    def __init__(self, labels: dict[str, str] | None):
        self.steps: dict[int, int] = {}
        self._published: dict[int, int] = {}
        self._labels, self._last = labels, None
        if labels is None:
            return
        # Imported here: prometheus_client settles on its multiprocess directory at import, and SGLang sets it late.
        from prometheus_client import Counter, Gauge

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"idlm:{name}", text, labelnames=list(labels), multiprocess_mode="mostrecent").labels(**labels)

        self._counter = Counter("idlm:steps", "Decode steps by stride.", labelnames=[*labels, "stride"])
        self._mixed = Counter("idlm:mixed_steps", "Decode steps that a prefill's forward took along.", labelnames=list(labels)).labels(**labels)
        self._stride = gauge("stride", "Stride of the last decode step.")
        self._expected = gauge("stride_gain_expected", "Tokens per second over those of stride 1, as the controller expects them.")
        self._actual = gauge("stride_gain_actual", "Tokens per second over those of stride 1, as they turned out lately.")

    def step(self, stride: int) -> None:
        """A decode step begins."""
        self.steps[stride] = self.steps.get(stride, 0) + 1
        if stride != self._last and self._labels is not None:
            self._last = stride
            self._stride.set(stride)

    def publish(self) -> None:
        """Bring the counter of steps up to date."""
        for stride, steps in self.steps.items():
            new = steps - self._published.get(stride, 0)
            if new:
                self._counter.labels(**self._labels, stride=str(stride)).inc(new)
        self._published = dict(self.steps)

    def mixed(self) -> None:
        """The step's rows were in a prefill's forward."""
        if self._labels is not None:
            self._mixed.inc()

    def gains(self, expected: float | None, actual: float | None) -> None:
        """The controller decided."""
        if self._labels is None:
            return
        if expected is not None:
            self._expected.set(expected)
        if actual is not None:
            self._actual.set(actual)
