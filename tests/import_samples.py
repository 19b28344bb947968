"""One short config of each toolkit, written for these tests, as (file name, text), and how tests import them."""

from llmtune.config.importers.convert import import_source
from llmtune.config.importers.source import read_sources
from llmtune.config.keys import value_of
from llmtune.config.layers import parse_config


def imported(folder, text, name="config.yaml", peer=None):
    """The import of a text that is written to a file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return import_source(read_sources(path)[0], peer)


def values(result):
    """The config that the written YAML loads to, as a lookup by our keys."""
    config = parse_config(result.yaml).config
    return lambda key: value_of(config, key)


def row_of(result, key):
    """What became of one key."""
    (row,) = [row for row in result.keys if row.key == key]
    return row


SAMPLES = {
    "axolotl": (
        "lora.yml",
        """\
base_model: org/base-1b
adapter: qlora
load_in_4bit: true
lora_r: 8
lora_alpha: 32
lora_target_linear: true
datasets:
  - path: org/alpaca
    type: alpaca
    split: train[:1%]
sequence_len: 1024
sample_packing: true
val_set_size: 0.05
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
learning_rate: 0.0002
optimizer: adamw_bnb_8bit
bf16: auto
gradient_checkpointing: true
saves_per_epoch: 4
evals_per_epoch: 2
dataset_prepared_path: prepared
wandb_entity:
resume_from_checkpoint: null
plugins:
  - axolotl.integrations.liger.LigerPlugin
""",
    ),
    "llama-factory": (
        "sft.yaml",
        """\
model_name_or_path: org/base-1b
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,pairs
template: qwen3_nothink
cutoff_len: 1024
max_samples: 100
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
save_steps: 500
eval_steps: 500
output_dir: saves/lora
report_to: none
plot_loss: true
""",
    ),
    "llama-factory-v1": (
        "v1.yaml",
        """\
model: org/base-1b
model_class: llm
peft_config: {name: lora, r: 16, lora_alpha: 32, target_modules: all}
kernel_config: {name: auto}
quant_config: null
train_dataset: rows.jsonl
output_dir: outputs
micro_batch_size: 2
global_batch_size: 16
cutoff_len: 512
learning_rate: 1.0e-4
max_steps: 10
sample_backend: hf
""",
    ),
    "trl": (
        "sft.yaml",
        """\
model_name_or_path: org/base-1b
dataset_name: org/chat
use_peft: true
learning_rate: 2.0e-4
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
num_train_epochs: 1
packing: true
max_length: 512
eval_strategy: steps
eval_steps: 50
warmup_steps: 0.1
max_steps: -1
output_dir: out
""",
    ),
    "torchtune": (
        "lora.yaml",
        """\
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 64
  lora_alpha: 128
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: 512
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/base
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
shuffle: True
batch_size: 4
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
epochs: 2
max_steps_per_epoch: 50
gradient_accumulation_steps: 8
clip_grad_norm: null
dtype: bf16
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
""",
    ),
    "litgpt": (
        "lora.yaml",
        """\
checkpoint_dir: checkpoints/org/base
out_dir: out/lora
precision: bf16-true
quantize: bnb.nf4
devices: 1
lora_r: 32
lora_key: true
data: {class_path: litgpt.data.Alpaca2k, init_args: {mask_prompt: false, val_split_fraction: 0.05}}
train:
  global_batch_size: 8
  micro_batch_size: 2
  lr_warmup_steps: 10
  epochs: 2
  max_seq_length: 512
  min_lr: 6.0e-05
  max_norm:
eval: {interval: 100, initial_validation: false}
logger_name: csv
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.0003, weight_decay: 0.0, betas: [0.9, 0.95]}}
""",
    ),
    "unsloth": (
        "tune.py",
        """\
from unsloth import FastLanguageModel
from trl import SFTConfig, SFTTrainer
max_seq_length = 2048
model, tok = FastLanguageModel.from_pretrained("unsloth/base-1b", max_seq_length=max_seq_length, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model, r=16, target_modules=["q_proj", "v_proj"], lora_alpha=16, bias="none",
    use_gradient_checkpointing="unsloth", random_state=3407, loftq_config=None,
)
dataset = load_dataset("org/alpaca", split="train")
trainer = SFTTrainer(
    model=model, train_dataset=dataset,
    args=SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, max_steps=60,
        learning_rate=2e-4, optim="adamw_8bit", weight_decay=0.01, lr_scheduler_type="linear",
        bf16=is_bfloat16_supported(), fp16=not is_bfloat16_supported(), report_to="none", output_dir="outputs",
        eval_steps=compute_steps(),
    ),
)
""",
    ),
    "unsloth-studio": (
        "model.yaml",
        """\
training:
  max_seq_length: 2048
  num_epochs: 0
  max_steps: 30
  learning_rate: 2e-4
  batch_size: 2
  gradient_accumulation_steps: 4
  random_seed: 3407
  train_on_completions: true
  gradient_checkpointing: unsloth
lora: {lora_r: 16, lora_alpha: 16, target_modules: [all-linear], use_rslora: true, use_loftq: false}
logging: {enable_wandb: false, log_frequency: 10}
inference: {temperature: 1.0}
""",
    ),
    "ms-swift": (
        "sft.sh",
        """\
# two cards
NPROC_PER_NODE=2 \\
swift sft \\
    --model org/base-1b \\
    --tuner_type lora \\
    --dataset 'org/alpaca-zh#500' \\
              'org/alpaca:en#200' \\
    --torch_dtype bfloat16 \\
    --learning_rate 1e-4 \\
    --gradient_accumulation_steps 8 \\
    --max_length 2048 \\
    --split_dataset_ratio 0.01 \\
    --eval_steps 50 \\
    --system 'You are helpful.' \\
    --model_author me --model_name robot
""",
    ),
    "mlx-lm": (
        "lora.yaml",
        """\
model: org/base-1b
train: true
fine_tune_type: lora
data: rows
iters: 1000
grad_accumulation_steps: 3
num_layers: 8
steps_per_report: 10
steps_per_eval: 200
learning-rate: 0.0001
alpha: 16
lora_parameters: {rank: 16, scale: 20.0, dropout: 0.0, keys: [self_attn.q_proj, self_attn.v_proj]}
""",
    ),
    "oumi": (
        "train.yaml",
        """\
model: {model_name: org/base-1b, model_max_length: 2048, torch_dtype_str: bfloat16, trust_remote_code: False}
data:
  train:
    datasets:
      - {dataset_name: org/chat, split: "train[:10%]", sample_count: 50}
    collator_name: text_completions_only_with_padding
training:
  trainer_type: TRL_SFT
  use_peft: true
  output_dir: out
  per_device_train_batch_size: 4
  optimizer: adamw_torch
  learning_rate: 2.0e-05
  max_grad_norm: 0
  dataloader_num_workers: auto
  enable_gradient_checkpointing: true
peft: {q_lora: true, lora_r: 64}
""",
    ),
    "nemo": (
        "finetune.yaml",
        """\
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 32, local_batch_size: 4, ckpt_every_steps: 100, val_every_steps: 10, num_epochs: 2}
dist_env: {backend: nccl}
rng: {_target_: nemo_automodel.StatefulRNG, seed: 1111}
model: {_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: org/base-1b}
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, target_modules: "*_proj", dim: 8}
distributed: {strategy: fsdp2, tp_size: 1}
dataset:
  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset
  dataset_name: org/squad
  split: train
validation_dataset:
  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset
  dataset_name: org/squad
  split: validation
  limit_dataset_samples: 64
packed_sequence: {packed_sequence_size: 0}
optimizer: {_target_: torch.optim.Adam, lr: 1.0e-5, betas: [0.9, 0.999], weight_decay: 0}
lr_scheduler: {lr_decay_style: cosine, min_lr: 1.0e-6}
""",
    ),
    "soup": (
        "soup.yaml",
        """\
base: org/base-1b
task: sft
data: {train: rows.jsonl, format: alpaca, val_split: 0.1}
training:
  epochs: 3
  lr: 2e-4
  batch_size: auto
  lora: {r: 16, alpha: 32, target_modules: auto}
  quantization: 4bit
  my_switch: true
output: ./out
""",
    ),
}
"""Toolkit -> file name and text."""
