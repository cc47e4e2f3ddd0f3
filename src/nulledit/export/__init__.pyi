from nulledit.export.apply import apply_delta as apply_delta
from nulledit.export.apply import put_delta as put_delta
from nulledit.export.apply import remove_delta as remove_delta
from nulledit.export.checkpoint import write_checkpoint as write_checkpoint
from nulledit.export.delta import write_delta as write_delta
from nulledit.export.gguf import write_gguf as write_gguf
from nulledit.export.gguf_lora import write_gguf_lora as write_gguf_lora
from nulledit.export.lora import write_lora as write_lora
