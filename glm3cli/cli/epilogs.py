"""What `--help` of a command says below its options: the rules that no single option can tell."""

PREPROCESS = """
Inputs are files, folders and globs of parquet, jsonl, json, csv, tsv, arrow and txt, also as .gz,
.zst, .bz2 and .xz, and `-` for a pipe. In a folder, names that begin with `_` or `.`, caches of
datasets and what preprocess has written are passed over. The handlers are text, instruction, chat,
preference and feedback, and ModelLink's eight by their names. Lists in text columns, as in CSV, are
read as JSON. chat reads OpenAI's messages, ShareGPT's conversations, a conversation of such turns
or of pairs of human and assistant, MOSS, alpaca with history, and prompt with completion (query
with response, question with answer, content with summary), each with system (also system_prompt)
and tools (also functions), and calls of tools as tool_calls, function_call, or ChatGLM3's turns of
the role tool. Results of tools get the order of the calls that their tool_call_id names. The column
input stands below the question of a row; a context, pictures, and thoughts beside an answer are
refused. An answer with loss false (also weight 0, train false, or loss_scale 0) isn't trained.
Where ModelLink's handlers are broken (an empty input that becomes the word None, three quotes where
a line break belongs, Baichuan's roles for MOSS, a question of BELLE's without Assistant: that is
lost), glm3's do what the name says.

preference reads a prompt (a text, or what chat reads, with tools) with a chosen and a rejected
answer: the columns chosen and rejected of TRL and LLaMA-Factory, OpenAI's preferred_output and
non_preferred_output, or ms-swift's rejected_response and rejected_messages. feedback reads an
answer to a prompt with a label, true or false, or 1 or 0 (also kto_tag). Answers may be whole
conversations that begin with the prompt; without one, it is what they have in common.
--seq-length cuts prompts from the left and keeps answers whole; pairs whose answers don't fit, or
are equal, are left out and counted.

A run that was stopped or killed goes on where it was when the same command is given again, and
ends with the same bytes. A run whose result is there already, made of the same inputs, tokenizer
and settings, isn't repeated (--force repeats it).

A bad row ends the run; the error names its file, row and field, and shows the first five of its
kind. --on-error skip lists such rows in PREFIX.errors.jsonl instead, and goes on with the next row.
Where a file is damaged so that it can't, the rest is written, the share that is lost is named, and
the exit code is 3. PREFIX.stats.json counts documents, tokens and lengths, and what was cut,
dropped, skipped or lost.

--pack puts several samples into a sequence by best fit, the longest first. attention_mask then
numbers the samples of a sequence from 1, and in training no sample sees another.

--part I/N does the I-th of N parts, cut at equal numbers of bytes, into the folder
PREFIX-part-I-of-N; machines may have their own copies of the input. With all folders in one place,
`--merge PREFIX-part-*-of-N --output-prefix PREFIX` joins them: texts, packs and statistics become
what one machine would have written, byte for byte.

--build-index builds the sample indices of a pretraining beforehand; the training finds them if it
has the same data, --seq-length, --train-iters, --global-batch-size, --split and --seed.

Text is encoded by gigatoken, several times as fast as sentencepiece and with the same ids. Where
the two would differ, as on text that spells </s>, or where gigatoken isn't installed,
sentencepiece encodes.
"""

TRAIN = """
Data: --data is the prefix of files that preprocess has made, or raw data, which is preprocessed
once by one process a machine into `data` of the run's folder or into --data-cache. pretrain reads
the column `text` of raw data and ends each text with the end token; finetune reads all forms that
`preprocess --handler chat` knows. `--data 3:FIRST --data 1:SECOND` blends, and so does a YAML file
with a list of such items. The start shows documents, tokens, samples and epochs of each part.

Planning: --dry-run prints memory and the pipeline of each stage, and writes nothing. With --chip
or --device-memory it also lists the parallel sizes that fit, the fastest first, and predicts the
step from the operators that it would run. A tenth of the memory is left for what isn't counted.
The devices, with the sources of their figures, are in glm3cli/device/chips.toml; a file with the
same keys describes your own (--chip FILE.toml). A run that doesn't fit into its device, or into
--device-memory, isn't started; the error names the nearest sizes that fit. --auto-layout starts, or
plans, the fastest sizes that fit, says why, and writes them into run.yaml: for --chip with
--device-memory, or for the device that is here (a 910B, a GPU by its name, a CPU roughly).

Checkpoints: RUN/iter_0000030 holds weights, optimizer, schedule, random generators and the
position in the data. Training goes on from it at any tp, pp, vpp, cp and dp, and with or without
the distributed optimizer. It is written beside while training goes on, sent to the disk, listed
with its checksums, and renamed: it is there whole or not at all. A damaged one is named at the
start and passed over. One run alone may write into a folder. RUN as a model is its newest
checkpoint: where a run goes on from an earlier one (--resume RUN/iter_0000030), later ones become
RUN/aside_iter_0000060 with its first save.

Going on: the schedule follows the steps, also where --global-batch-size has changed. With another
command, model or data (by their content, wherever they are) a run doesn't go on, unless
--allow-changed names what has changed; other options that differ are named.

Stops: SIGTERM, SIGINT, SIGHUP (unless nohup started it) and --exit-duration end the run after a
save (exit code 143); the same command goes on. SIGUSR1 saves and goes on. torchrun kills its ranks
30 s after a SIGTERM: export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 so that a large model has the time
to save; --nproc does that by itself. A loss or gradient that is no number changes no weight: all
ranks skip the step; a run that has no other steps ends with code 3.

Reports: every step is a line of the log and of RUN/metrics.jsonl; RUN/report.html shows them.
TFLOP/s count the model's operations without recomputation, by two conventions: `full`, 6N + 12 L h
s per token (N weights of matrix products, L layers, h query size, s sequence length), by which
fields without a name go, and `causal`, which halves the attention; weights that aren't trained
count 4 times instead of 6. MFU is over the device's dense peak. The times are those of rank 0's
host: data_wait, forward_backward, optimizer and other add up to step_time. --profile 10:12 writes
traces for Perfetto into RUN/profile.

Many machines: see the head of glm3cli/parallel/launch.py.
"""

FINETUNE = f"""{TRAIN}
Instructions: samples are padded to the longest of their micro-batch, or, --packing, put together
into sequences of --seq-length, in which none sees another. The log and metrics.jsonl say tokens a
second with padding (tokens/s/device, by which TFLOP/s go), without, and of trained tokens alone.
The loss is the mean over the trained tokens of a global batch, each with the `weight` of its row;
--loss-average sample makes it the mean of the samples' means. The losses of several data sets are
reported one by one, too. The start shows a sample by ids and pieces, with what is trained of it,
and warns of data that makes bad models. --epochs counts an epoch of a blend as the samples of all
its data sets. A step is validated before it is saved; RUN/best is the checkpoint of --keep-best.

Adapters: --lora-rank trains low-rank matrices beside the weights, which stay as they are and take
neither gradients nor optimizer state. RUN/iter_0000030/adapter is an adapter in PEFT's layout under
the chatglm names, for the model of --model; the rest of the checkpoint is for going on. `--lora` of
generate, eval and convert takes the run, a checkpoint, or an adapter of PEFT's, which --adapter
goes on to train with a new optimizer. As a MODEL, such a run is its --model with the adapter. Of a
PiSSA the weights stay, too: the part of them that it begins with is subtracted, and its adapter has
twice the rank. A DoRA drops inputs of its adapter alone, not of the weights. The log's learning
rate is that of the matrices A; --lora-plus multiplies that of B.

Some weights: --train-only and --freeze are regular expressions that match anywhere in the names of
the original files, such as transformer.encoder.layers.27.mlp.dense_h_to_4h.weight (output_layer and
word_embeddings are the two outside the layers). What a run trains can't change when it goes on.

Preferences: dpo, orpo and simpo learn from pairs of a chosen and a rejected answer, kto from single
answers that were liked or not (`preprocess --handler preference` and `feedback`, or raw data of
these forms). Names, defaults and losses are TRL's; sigmoid with --label-smoothing is cDPO. A sample
is a pair: --seq-length is the longest answer with its prompt, and a pair takes up to twice that.
The loss is the mean over the pairs or answers of a global batch; that of next tokens, which orpo
has and --sft-weight adds, is the mean over its tokens. kto's divergence is the mean over a global
batch of prompts with other prompts' answers.

dpo and kto compare with a reference: the model of --reference, or --model without adapters. It
looks at all samples before the training, at the training's parallel sizes, in the place of the
model that trains. What it thinks is kept in `data` of the run's folder or in --data-cache, and is
found there by the content of the reference and of the data. The log, metrics.jsonl and the report
have TRL's rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies and logps.
"""

CONVERT = """
The new folder is written beside its name and renamed when it is complete. With --verify, every
tensor is read back and compared, and a `glm` folder is also loaded by transformers; a model of up
to half a billion parameters has its logits compared. glm3-manifest.json notes where the folder
comes from and the checksums of its files and tensors; `glm3 convert inspect --check` compares them
again. DST gets config.json and the tokenizer's files, so that it can be used alone.

vLLM and transformers load the layout glm as it is, MindIE and llama.cpp's converter the layout
chatglm with the original code; `glm3 convert inspect FOLDER --for vllm` (mindie, llama.cpp,
transformers) says by their rules what is in the way.
"""

SCRIPT = """
Reads scripts that start pretrain_gpt.py, posttrain_gpt.py, inference.py, evaluation.py,
preprocess_data.py or convert_ckpt.py, of ModelLink 1.0 to 1.2 and MindSpeed-LLM 2.0 to 2.3, or
written after theirs. Prints the run.yaml (for a conversion the command) with a comment for each
flag: taken over, needless here, or not supported, and why. What a script leaves to its program's
defaults is filled in where glm3's own differ.

Nothing is executed. Variables, arrays, functions and sourced files are followed; of a condition the
first branch, of a loop the first round; `$(...)` stays as it is. --set NAME=VALUE gives a variable
another value, such as a path that the script leaves open:

    glm3 convert script tune.sh --set CKPT_LOAD_DIR=mg --output run.yaml
    glm3 finetune --config run.yaml --dry-run
"""

GENERATE = """
--prompt continues a text, as a base model does; --answer asks it as a user's turn, as a chat model
expects it. With several ranks, those that tp x pp leave over share the prompts.

How tokens are chosen is defined as in transformers; --presence-penalty and --frequency-penalty as
in OpenAI's API. What no option says is taken from the model's generation_config.json (the log says
what, and what of it isn't read), and else has the value in brackets. --num-beams alone searches;
with --temperature, --top-k, --top-p or --min-p its beams are drawn. An answer ends at the tokens
that end a turn, at those of generation_config.json and --stop-id, or before a --stop text (or one
of the file's stop_strings): finish_reason of --json is then stop
or stop_text, else length. An answer to --json-schema or --regex follows it if it isn't cut at
--max-new-tokens. The same seed draws the same tokens at any --tp, --pp and batch size, unless two
are so nearly alike that a rounding decides.

--quantize int8 has a scale for each output of a layer, int4 a scale and a zero point for each group
of up to 128 inputs; the output layer has 8 bits in both.

--prompts-file has a JSON string, {"prompt": "..."} or {"messages": [...]} in each line, the latter
in any form that training reads, with tools and system beside it, or is a batch in OpenAI's form,
whose results keep their custom_id. Options such as max_new_tokens (or max_tokens), temperature and
seed may stand beside the prompt for its line alone; the n-th prompt otherwise has the seed --seed +
n, from 0. Results come in the order of the lines, and a bounded number of lines
is in memory. All lines are checked before the model is loaded; --on-error skip gives a bad one a
result with `error`. --output gets one JSON line per prompt (OUTPUT.run.json notes the settings),
and --resume goes on where a stopped or killed run has ended, with the same results; so it does with
lines that the file has got since. A line that has changed in anything is refused then: `request` in
each result is a digest of its line.

--chat talks: /help lists its commands, Ctrl-C stops an answer, and lines typed are kept for the
next chat in ~/.local/state/glm3/chat_history. --tools names a JSON list of tools in ChatGLM3's or
OpenAI's form, or a Python file, whose public functions become tools by their signatures and
docstrings. A call of the model is shown, and what is typed next is taken for its result; with
--run-tools the functions are run instead. Without it, nothing of the Python file is executed. With
several ranks, start them by --nproc: torchrun itself ends when Ctrl-C is pressed.

--serve answers /v1/completions, /v1/chat/completions and /v1/models as OpenAI's clients expect (pip
install 'glm3[serve]'), with streams, tools, response_format, logprobs, echo, and top_k, min_p,
repetition_penalty and ignore_eos beside OpenAI's own fields; also /health, /metrics for Prometheus,
/openapi.json, /tokenize, /detokenize, and a page to chat at /. The address alone decides who can
ask: a PORT, or 127.0.0.1:PORT, this machine; 0.0.0.0:PORT everybody, whom --api-key-file asks for a
key. Each request says how its answer is made; what it doesn't say is taken from the options here
and from generation_config.json. A chat's answer may fill the model's positions or
--max-request-tokens, a completion has 16 tokens. --max-batch-size times --pp answers run side by
side, and --max-queue more wait; then requests are refused with 429. SIGTERM or Ctrl-C refuses new
requests with 503, lets running answers end within --shutdown-timeout, and exits with 0. Prompts are
in no log. --lora NAME=ADAPTER (repeat it) has requests for the model NAME computed with an adapter,
side by side with those for the others and for the bare model. More ranks than --tp times --pp hold
further copies of the model, each with as many places; an answer is made by the copy that
has the least to do, or has read the beginning of its prompt. Encryption is a reverse proxy's work.
lm-evaluation-harness scores a server:

    lm_eval --model local-completions --tasks TASK
    --model_args model=NAME,base_url=http://127.0.0.1:8000/v1/completions
"""

EVAL = """
Every score has two intervals of 95 %: Wilson's, which takes the questions for a sample of all that
could be asked, and one whose standard error is cluster-robust, which takes the subjects for it and
is wider where questions of a subject resemble each other. Beside them stands the smallest
difference that so many questions can show. Prompts that don't fit into the model's positions lose
shots, and are counted; so are answers without a letter.

--output (results.json) has all answers with the settings and a hash of the prompts; the page beside
it (results.html) shows them. The answers come into OUTPUT.partial.jsonl first: after a kill the
same command with --resume goes on. At the same sizes and --batch-size its result is that of a run
which was left alone, byte for byte; elsewhere scores differ by roundings.

Two results of the same prompts are compared by `compare`, which says whether the difference is more
than chance. Two intervals that overlap don't say that it is none:

    glm3 eval compare base.json tuned.json

Exit codes: 0 done, 2 wrong usage or options, 3 bad questions, results or weights (a model that
gives NaN, too), 4 a device that fails. What fails writes no result.
"""

CUSTOM = """
A line has `question`, `answer`, and maybe `choices`, `subject` and `category`:

    {"question": "2 + 3 =", "choices": ["4", "5", "6"], "answer": "B"}
    {"question": "Who wrote Hamlet?", "answer": ["Shakespeare", "William Shakespeare"]}

With choices the answer is a letter, the place of an option from 0 on, or an option; the model
answers by the likeliest letter. Without, it goes on greedily up to --stop, and its text must be one
of the answers, but for spaces. A file has questions of one kind. Choices may also be `options`, the
columns A, B and so on, or ARC's texts and labels with `answerKey`; a `context`, `passage` or
`article` stands in front of its question. CSV, parquet and Arrow files are read, too.
"""

NEEDLE = """
A number stands once in a text, and is asked for at its end; it is found if each of its tokens is
the likeliest one. Use it with a model that finds needles in short texts: lengths at which it begins
to fail then show positions that are wrong (rope_ratio, a factor of positions), which short
benchmarks such as MMLU don't.
"""

COMPARE = """
Both results must be of the same prompts, which their hashes show. The difference is that of the
pairs (second minus first), with a 95 % interval over questions and one over subjects, a paired t
test, and McNemar's exact test on the questions that one of them alone has right. The page beside
--output shows both side by side, and every question whose answer changed.
"""

HARNESS = """
--data-dir reads data sets as their authors publish them, each in a folder of its name: boolq,
hellaswag, arc, gsm8k, humaneval, agieval, bbh (.jsonl, .json, .jsonl.gz). Tasks, prompts and
metrics stay the harness's own, and nothing is fetched. Tasks of your own come from --include-path.

Tasks that run what the model has written, such as humaneval, need --run-code: each program runs in
an empty folder, with limits on time, memory, files and processes, and without a network. That keeps
accidents away, not attackers; use a container against those.

The result has the harness's form, with the answer to every question (--no-log-samples leaves them
out). --use-cache keeps answers, from which a run that was cut off goes on. Exit codes are those of
`glm3 eval --help`.
"""

DOCTOR = """
--numerics runs every fused operator, forward and backward, in fp32, bf16 and fp16, at the shapes
that the 6B has at tp 1, 2, 4 and 8, and compares it with its formula in fp64 on the host; then
inputs that are known as traps (packs, padding, overflow), every collective over --nproc ranks, and
a small model that trains, saves, goes on, and generates. The table has the largest error of each,
relative to numbers of the usual size, and its limit. For each failure a sentence says what to do
without that operator; the exit code is then 4. An operator of a card is checked on every rank.

--chip-file also measures what plans are made with, and describes the device in a file for --chip.

In a container the NPUs, the driver, the addresses of the NPUs' network, and shared memory must be
passed on:

    docker run -it --network host --shm-size 64g
    $(printf -- '--device /dev/davinci%d ' 0 1 2 3 4 5 6 7)
    --device /dev/davinci_manager
    --device /dev/devmm_svm --device /dev/hisi_hdc
    -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro
    -v /usr/local/dcmi:/usr/local/dcmi:ro
    -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro
    -v /etc/ascend_install.info:/etc/ascend_install.info:ro
    -v /etc/hccn.conf:/etc/hccn.conf:ro -v "$PWD:$PWD" -w "$PWD"
    quay.io/ascend/cann:9.0.0-910b-ubuntu22.04-py3.11 bash
"""
