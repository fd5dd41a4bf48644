"""Preflight: validate a run in seconds, before its first step.

:mod:`examine <topd_jax.cli.doctor.examine>` lists all checks. Each is a
function that yields findings: of what files and settings say
(:mod:`tokens <topd_jax.cli.doctor.tokens>`,
:mod:`fit <topd_jax.cli.doctor.fit>`), then of what the models do
(:mod:`batch <topd_jax.cli.doctor.batch>`,
:mod:`kernels <topd_jax.cli.doctor.kernels>`). The paper has none of this.
"""
