"""Everything that the page says, in its languages."""

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS: dict[str, dict[str, str]] = {
    "en": {
        "intro": "Ask about a video with its sound, an image or a sound.",
        "model": "Model",
        "file": "Drop a video, an image or a sound here, or tap to choose one",
        "start": "From (seconds)",
        "end": "To (seconds)",
        "frames": "What the model sees: {count} frames of {width} × {height} pixels",
        "image": "What the model sees: {width} × {height} pixels",
        "sound": "What the model hears: {seconds:.1f} seconds, as a waveform and as filter banks",
        "silent": "There is no sound here; the model hears silence.",
        "deaf": "This model does not hear; it only sees.",
        "tokens": "This takes {count} tokens of the conversation.",
        "unreadable": "{name} cannot be used.",
        "unknown_kind": "Its name should end in .mp4, .webm, .jpg, .png, .wav, .mp3 or the like, to say what it is.",
        "no_file": "First choose a file that can be read.",
        "no_question": "First type a question.",
        "welcome": "### Choose a file, then ask about it",
        "try": "Or try the example clip:",
        "question": "Ask about it",
        "new": "New conversation",
        "part": "{name}, from {start:.1f} s to {end}",
        "second": "{seconds:.1f} s",
        "its_end": "its end",
        "no_model": "The model cannot be loaded.",
        "failed": "This could not be answered.",
        "no_memory": "The memory of the GPU is not enough. Choose a shorter part or begin a new conversation.",
        "status": "{new} tokens in {seconds:.1f} s; {reused} of {prompt} tokens before them were remembered.",
        "cut_off": "The answer was cut off after {new} tokens.",
        "stopped": "Stopped; the model will not remember this turn.",
    },
    "zh": {
        "intro": "就一段有声视频、一张图片或一段声音提问。",
        "model": "模型",
        "file": "将视频、图片或声音拖到此处，或点击选择",
        "start": "开始（秒）",
        "end": "结束（秒）",
        "frames": "模型看到的画面：{count} 帧，每帧 {width} × {height} 像素",
        "image": "模型看到的画面：{width} × {height} 像素",
        "sound": "模型听到的声音：{seconds:.1f} 秒，波形和滤波器组特征",
        "silent": "这里没有声音，模型听到的是静音。",
        "deaf": "该模型没有听觉，只能看画面。",
        "tokens": "占用对话 {count} 个词元。",
        "unreadable": "无法使用 {name}。",
        "unknown_kind": "从文件名无法判断类型，文件名应以 .mp4、.webm、.jpg、.png、.wav、.mp3 等结尾。",
        "no_file": "请先选择一个可以读取的文件。",
        "no_question": "请先输入问题。",
        "welcome": "### 选择一个文件，然后提问",
        "try": "或者试试示例视频：",
        "question": "输入问题",
        "new": "新对话",
        "part": "{name}，从 {start:.1f} 秒到{end}",
        "second": "{seconds:.1f} 秒",
        "its_end": "结尾",
        "no_model": "无法加载模型。",
        "failed": "无法回答这个问题。",
        "no_memory": "显存不足。请选择更短的片段，或开始新对话。",
        "status": "{seconds:.1f} 秒内生成 {new} 个词元；之前的 {prompt} 个词元中有 {reused} 个取自缓存。",
        "cut_off": "回答在 {new} 个词元后被截断。",
        "stopped": "已停止，模型不会记住这一轮。",
    },
}

# About the clip that the package brings along. Its model speaks English only.
EXAMPLE_QUESTIONS = ("What do you see and hear?", "What moves, and in which direction?", "What do you hear?")


def choose_language(accepted: str) -> str:
    """The page's language for a browser that sends `accepted` (`Accept-Language`): Chinese where it comes first."""
    return "zh" if accepted.lower().startswith("zh") else "en"


__all__ = ["EXAMPLE_QUESTIONS", "LANGUAGES", "TEXTS", "choose_language"]
