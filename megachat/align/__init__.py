"""From a base model to an assistant: fine-tuning on conversations, then learning from preferences.

The mathematics is pure functions of plain tensors: `logprobs`, `advantages`, `policy`, the top of `rm`, `dpo`
and `ppo`. `rollout` samples answers from the policy being trained, `environments` are what it may call while
it writes `answers`, `rewards` scores them by programs. Each stage is one file: `sft`, `rm`, `dpo`, `ppo`,
`grpo`.
"""
