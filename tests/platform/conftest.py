"""SGLang first: importing it resolves the platform, which imports ours in turn. The other way round is a circle."""

import sglang  # noqa: F401
