"""Published outputs of stages: manifests, verification and locks."""
