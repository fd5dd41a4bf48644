"""Preflight: whether a run's parts fit, in seconds, before its first step.

:mod:`examine <topd_jax.cli.doctor.examine>` has the two stages: what files and
settings say (:mod:`tokens <topd_jax.cli.doctor.tokens>`,
:mod:`fit <topd_jax.cli.doctor.fit>`), then what the models do
(:mod:`scored <topd_jax.cli.doctor.scored>`). Every check is a function that
returns findings.
"""
