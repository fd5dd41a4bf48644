"""Every knob, with its unit and its source.

"Paper" is arXiv:2606.00305 with its section; "ours" is a choice of this
project. Other files start from this one and change what differs.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The default configuration, the documentation of all others."""
    config = ConfigDict()

    # Seeds the order of prompts, rollouts, branches and controls.
    config.seed = 0

    # Devices an axis; their product is the number of devices.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # replicas; -1: all that the others leave
    config.mesh.fsdp = 1  # rows, and parameters spread over them
    config.mesh.tensor = 1  # heads, feed-forward columns, vocabulary
    config.mesh.expert = 1  # rows, and the experts of a mixture
    # Columns of the rows that are learnt from; else rows (arXiv:2407.21783).
    config.mesh.sequence = 1

    # The teacher on devices of its own, the last ones: of several processes
    # all of the last processes, or, where those do not make up the number, as
    # many of each. The others are the student's, and config.mesh is of those
    # (ours).
    config.teacher_mesh = ConfigDict()
    config.teacher_mesh.devices = 0  # the teacher's; 0: one mesh for both
    config.teacher_mesh.data = -1  # as of config.mesh, and so on
    config.teacher_mesh.fsdp = 1
    config.teacher_mesh.tensor = 1
    config.teacher_mesh.expert = 1
    config.teacher_mesh.sequence = 1
    # Slices of a batch: each is scored while the next is written.
    config.teacher_mesh.parts = 1

    # The model that learns.
    config.student = ConfigDict()
    # "world"; a Hugging Face directory or hub name; a .gguf file;
    # "package:NAME" for the GGUF file that an installed package carries; or
    # a run's work directory (its student's latest checkpoint; WORKDIR/best,
    # or WORKDIR/checkpoints/STEP).
    config.student.source = "world"
    config.student.keep_layers = ()  # indices of layers kept; () keeps all
    config.student.dtype = "float32"  # compute: float32 or bfloat16 (paper)
    config.student.param_dtype = "float32"  # master weights
    config.student.remat = "none"  # none, dots or full: recompute layers
    config.student.unroll = 1  # layers unrolled in the scan
    # Of more than 127 queries at once, and of a token that is decoded: "blocks"
    # of them, or "flash", kernels on TPU that skip what is not seen
    # (arXiv:2205.14135, 2307.08691).
    config.student.attention = "blocks"
    # Low-rank adapters (arXiv:2106.09685): only they are trained, in float32.
    config.student.lora_rank = 0  # r; 0: the whole student is trained
    config.student.lora_alpha = 16.0  # scale is alpha / r (PEFT's scripts)
    # Of q, k, v, o, gate, up, down; (): all, but never experts.
    config.student.lora_targets = ()
    # Scale alpha / sqrt(r) instead (arXiv:2312.03732).
    config.student.lora_rank_stabilised = False
    # Directory or hub name of a PEFT adapter to start from, which then says
    # rank, alpha and targets; the teacher's is merged into it. "": none.
    config.student.adapter = ""

    # "int8" or "int4": large matrices kept as integers, frozen (teacher only).
    config.student.quantize = ""
    # Inputs that share a scale; 0: all of them in int8, 32 in int4 (ours).
    config.student.quantize_tile = 0

    # The frozen model that scores; the same keys.
    config.teacher = config.student.copy_and_resolve_references()
    # Several teachers instead: name -> a section with the keys of teacher.
    # data.teacher_field says which of them each prompt belongs to.
    config.teachers = ConfigDict()

    # Prompts.
    config.data = ConfigDict()
    config.data.source = "world"  # world, jsonl, tfds or hub
    config.data.path = ""  # JSONL file, TFDS name or hub name
    config.data.eval_path = ""  # held-out JSONL; "": held_out of the prompts
    config.data.split = "train"  # TFDS or hub split
    config.data.eval_split = "test"  # the same for held-out prompts
    config.data.prompt_field = "question"
    config.data.answer_field = "answer"
    config.data.teacher_field = ""  # names one of config.teachers
    # Prompts a step of each of config.teachers, by name; (): as many as their
    # share of the records, at least one (ours).
    config.data.teacher_prompts = ()
    config.data.batch_size = 32  # prompts a step (paper, App. B: 1)
    config.data.samples = 1  # rollouts a prompt (paper, App. B: 4)
    config.data.max_prompt_length = 16  # tokens (paper, App. B: 800)
    config.data.on_long_prompt = "error"  # error or skip
    # Passed to the chat template as enable_thinking; None passes nothing.
    config.data.thinking = config_dict.placeholder(bool)
    # Ids that end a completion, beside those of tokenizer and models.
    config.data.end_ids = ()
    config.data.held_out = 64  # prompts set aside without eval_path

    # The student's rollouts.
    config.rollout = ConfigDict()
    config.rollout.max_new_tokens = 48  # tokens (paper, App. B: 8000)
    config.rollout.temperature = 1.0  # paper, App. B; 0 is greedy
    config.rollout.top_p = 1.0  # paper, App. B; 1 is off
    config.rollout.top_k = 0  # 0 is off
    # Where parameters are while tokens are written (ours): "train", as they
    # are trained, gathered over fsdp at every token; "gathered", once, in
    # compute dtype, where a device has room; "tensor": fsdp is a second tensor
    # axis meanwhile, and no parameter is gathered; kv heads must divide among
    # both, else the cache is; "rows": as "tensor" for products, but rows
    # come back for attention, and the cache stays where it is.
    config.rollout.sharding = "train"

    # What is optimised.
    config.objective = ConfigDict()
    # on_policy; or offline, stage 1 of App. B: the teacher writes.
    config.objective.stage = "on_policy"
    config.objective.kd_ratio = 0.5  # forward KL's share, stage 1 (App. B)
    # opd, opd+suppress, opd+suppress_control (paper, section 5.1), n_step
    # (ours), topd (paper, section 3), topd+suppress (ours); or a sibling
    # method, see siblings below.
    config.objective.variant = "topd"
    # Where guidance acts: teacher (section 5.2) or student (section 3).
    config.objective.context = "teacher"
    config.objective.divergence = "reverse_kl"  # paper; forward_kl, jsd
    config.objective.beta = 0.5  # of jsd (arXiv:2306.13649)
    config.objective.temperature = 1.0  # of both models' logits (paper)
    config.objective.log_floor = -100.0  # nats, floor of log p_T (ours)
    # Candidates: teacher_loss, -log p_T(y_t), or reverse_kl (ours).
    config.objective.score = "teacher_loss"
    config.objective.candidates = 3  # M, slots a row (paper, 2.1: 218)
    # Share of a row's tokens that fill slots (paper, 2.1: 0.0225).
    config.objective.fraction = config_dict.placeholder(float)
    config.objective.window = 10  # K, tokens (paper, section 2.1: 50)
    # What tells forks from false alarms: transport (paper, section 3), or
    # future_loss, the mean loss of the window, without branches (ours).
    config.objective.detector = "transport"
    # Of the batch's distances, each teacher's apart (ours).
    config.objective.percentile = 30.0
    # Fixed distance, 0..2, instead of the percentile (ours).
    config.objective.threshold = config_dict.placeholder(float)
    config.objective.epsilon = 0.05  # entropy of the plan (ours)
    config.objective.position_weight = 0.5  # cost of a window apart (ours)
    config.objective.branch_temperature = 0.0  # 0: greedy branches (ours)
    # Where the teacher's parameters are meanwhile (ours): train, gathered or
    # rows, as rollout.sharding has them.
    config.objective.branch_sharding = "train"
    config.objective.guidance_weight = 0.1  # lambda (ours)
    config.objective.anchor_first = True  # repair, context student (ours)
    # Along the branch: cross_entropy, forward_kl or reverse_kl (ours).
    config.objective.branch_loss = "cross_entropy"
    config.objective.n_step = 10  # tokens a bonus reaches (ours)
    config.objective.discount = 1.0  # of the bonus, a token (ours)
    config.objective.strength = 1.0  # of the bonus (ours)
    config.objective.cap = 1.0  # of overlapping bonuses (ours)
    # Tokens of a chunk of the fused losses; None picks by shape.
    config.objective.chunk_size = config_dict.placeholder(int)
    # Sibling methods: variants entropy_aware, trust_region, tip,
    # teachability, fire, agreement and prefix.
    config.objective.siblings = ConfigDict()
    config.objective.siblings.top_k = 16  # arXiv:2603.07079 (others: ours)
    config.objective.siblings.alpha = 1.0  # entropy_aware, 2603.07079
    config.objective.siblings.entropy_threshold = 0.8  # nats, 2603.07079
    config.objective.siblings.fraction = 0.5  # tip, teachability (ours)
    config.objective.siblings.drop = 0.2  # fire, 2606.02684
    config.objective.siblings.quantile = 0.1  # agreement (ours)
    config.objective.siblings.window = 64  # tokens, agreement, 2606.09471
    config.objective.siblings.gamma = 0.5  # prefix, 2606.22600

    # How the teacher writes in stage 1 (paper, App. B).
    config.offline = ConfigDict()
    config.offline.temperature = 0.6
    config.offline.top_p = 0.95
    # What topd generate writes: a TFDS set (array_record), or jsonl.
    config.offline.format = "array_record"
    config.offline.shard_size = 256  # solutions a shard, at least (ours)
    # Stage 1 reads the directory of topd generate; "": the teacher writes
    # within each step. A step takes data.batch_size x data.samples of them.
    config.offline.path = ""
    config.offline.keep = "all"  # all, correct or complete (ours)
    # Tokens of a row of several solutions (paper, App. B: 16384); 0: one each.
    config.offline.pack_length = 0

    # AdamW, linear warm-up, cosine.
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4  # peak (paper, App. B: 2e-6)
    config.optimizer.end_learning_rate = 1e-8  # the paper's trainer
    config.optimizer.warmup_fraction = 0.05  # of the steps (paper, App. B)
    config.optimizer.beta1 = 0.9  # the paper's trainer
    config.optimizer.beta2 = 0.98  # the paper's trainer
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0  # the paper's trainer
    config.optimizer.clip = 1.0  # global norm (paper, App. B)
    config.optimizer.accumulate = 1  # slices of a batch

    config.train = ConfigDict()
    config.train.steps = 300
    config.train.max_skipped = 10  # non-finite updates before giving up
    config.train.preflight = True  # topd doctor before the first step
    # Of several processes: seconds without a sign of life after which one
    # counts as dead, and the others stop with an error that names it.
    config.train.heartbeat = 100  # ours; that of jax.distributed

    # Intervals in steps.
    config.log = ConfigDict()
    config.log.every = 1
    config.log.statistics_every = 10  # exact and sampled KLs, entropies
    config.log.completions_every = 50
    config.log.completions = 4  # how many
    # Of every evaluation, the same ones each time (ours): completions, graded.
    config.log.problems = 8
    config.log.tensorboard = True
    config.log.top_k = 16  # of the overlap statistics

    config.eval = ConfigDict()
    config.eval.every = 50  # steps; 0: only at the end
    config.eval.problems = 400  # on the interval
    config.eval.final_problems = 1000  # at the end
    config.eval.batch_size = 200  # problems at once
    config.eval.temperature = 1.0  # 0 is greedy
    config.eval.split = "validation"  # of the tiny world; test at the end
    # topd eval only: completions a problem, and what to evaluate on instead
    # of the test problems: JSONL files with "problem" or "question" and
    # "answer", "tfds:NAME" or "hub:NAME" (split: data.eval_split).
    config.eval.samples = 1
    config.eval.benchmarks = ()

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 50  # steps; 0: only at the end
    config.checkpoint.keep = 2  # latest ones, beside the best

    # The tiny world's models, trained once and kept in the work directory.
    config.world = ConfigDict()
    config.world.seed = 0
    config.world.cache = ""  # directory; "": WORKDIR/world
    config.world.solutions = 50_000  # of each corpus
    config.world.prompts = 20_000  # distinct problems that runs draw from
    config.world.vocab_size = 64  # pieces of the tokenizer
    config.world.teacher_layers = 3
    config.world.teacher_width = 128
    config.world.teacher_heads = 4
    config.world.teacher_steps = 2300
    config.world.student_layers = 2
    config.world.student_width = 96
    config.world.student_heads = 4
    config.world.student_steps = 2600
    config.world.student_left_to_right = 0.8  # share of problems
    config.world.student_drops_carry = 0.3  # share of additions with a carry
    config.world.batch_size = 64  # solutions a step
    config.world.learning_rate = 2e-3  # peak

    # topd sweep: every variant ("topd:student" sets the context) and seed.
    config.sweep = ConfigDict()
    config.sweep.variants = ("opd", "topd:teacher", "topd:student")
    config.sweep.seeds = (0,)
    config.sweep.record = ""  # JSONL; "": WORKDIR/record.jsonl

    return config
